"""Every method that forgets samples of a classifier, by the name of its option. One file each."""

from classification.methods.dampening import Dampening
from classification.methods.expanding import BoundaryExpanding
from classification.methods.influence import Influence
from classification.methods.neggrad import NegGradPlus
from classification.methods.retrain import Retrain
from classification.methods.scissorhands import ClassifierScissorhands
from classification.methods.scrub import Scrub
from classification.methods.shrink import BoundaryShrink
from classification.methods.sparse import L1Sparse
from erase_sd.methods.ascent import GradientAscent
from erase_sd.methods.finetune import FineTune
from erase_sd.methods.salun import SalUn

METHODS = {
    "retrain": Retrain,
    "ft": FineTune,
    "ga": GradientAscent,
    "iu": Influence,
    "be": BoundaryExpanding,
    "bs": BoundaryShrink,
    "l1-sparse": L1Sparse,
    "salun": SalUn,
    "neggrad+": NegGradPlus,
    "scrub": Scrub,
    "ssd": Dampening,
    "scissorhands": ClassifierScissorhands,
}
