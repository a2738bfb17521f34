"""How does a classifier forget? One method a file, each beside its formula and its source.

nothing        the original model as it is: what every method has to beat
retrain        train from scratch on the retain set: what every other method is measured against
scissorhands   Scissorhands, Algorithm 1 or the loop of its released classification code
influence      IU: one Newton-like step with WoodFisher's inverse
expanding      BE: a shadow class for the forget set
shrink         BS: the class across the nearest boundary
salun          SalUn, with the walks of its released classification code
sparse         l1-sparse fine-tuning
neggrad        NegGrad+: ascent on the forget set, descent on the retain set
scrub          SCRUB: a student and its teacher
badteacher     BadT: an untrained teacher on the forget set
lotus          LoTUS: the teacher's answers on the forget set, made uncertain
dampening      SSD: selective synaptic dampening

FT and GA are those of `erase_sd.methods`.
"""

from typing import Any

from classification.methods.badteacher import BadTeacher
from classification.methods.dampening import Dampening
from classification.methods.expanding import BoundaryExpanding
from classification.methods.influence import Influence
from classification.methods.lotus import Lotus
from classification.methods.neggrad import NegGradPlus
from classification.methods.nothing import Nothing
from classification.methods.retrain import Retrain
from classification.methods.salun import ClassifierSalUn
from classification.methods.scissorhands import ClassifierScissorhands
from classification.methods.scrub import Scrub
from classification.methods.shrink import BoundaryShrink
from classification.methods.sparse import L1Sparse
from classification.task import ClassificationTask
from erase_sd.methods.ascent import GradientAscent
from erase_sd.methods.finetune import FineTune

METHODS = {
    "nothing": Nothing,
    "retrain": Retrain,
    "ft": FineTune,
    "ga": GradientAscent,
    "iu": Influence,
    "be": BoundaryExpanding,
    "bs": BoundaryShrink,
    "l1-sparse": L1Sparse,
    "salun": ClassifierSalUn,
    "neggrad+": NegGradPlus,
    "scrub": Scrub,
    "ssd": Dampening,
    "badt": BadTeacher,
    "lotus": Lotus,
    "scissorhands": ClassifierScissorhands,
}
FORGET_WALKERS = {"ga", "be", "bs"}  # an epoch of these is a walk through the forget set


def acts(method: Any, task: ClassificationTask, record: dict) -> bool:
    """Return whether the forget set was part of the update of this step, as its record tells."""
    step = record["step"]
    if isinstance(method, ClassifierScissorhands):
        apart = (method.objective, method.constraint) != ("ascent", "forget")  # then its loss is not in c
        return record["c"] > 0 or apart or record.get("joint", False)
    if isinstance(method, Scrub):
        return method.is_max(step, task.epoch("forget"), task.epoch("retain"))
    if isinstance(method, ClassifierSalUn) and method.walk == "turns":
        return step % task.epoch("turns") < task.epoch("forget")
    return not isinstance(method, FineTune | L1Sparse | Nothing)
