"""Erasing methods: one file each, and the registry. A method is a frozen dataclass of its knobs, called on a task.

It yields (record, state) after each step, or once if it has no steps; given its last state, it does nothing.
"""

from erase_sd.methods.ascent import GradientAscent
from erase_sd.methods.concept_ablation import ConceptAblation
from erase_sd.methods.erasediff import EraseDiff
from erase_sd.methods.esd import ESD
from erase_sd.methods.finetune import FineTune
from erase_sd.methods.forget_me_not import ForgetMeNot
from erase_sd.methods.salun import SalUn
from erase_sd.methods.scissorhands import Scissorhands
from erase_sd.methods.selective_amnesia import SelectiveAmnesia
from erase_sd.methods.sld import SLD
from erase_sd.methods.uce import UCE

METHODS = {
    "scissorhands": Scissorhands,
    "salun": SalUn,
    "ascent": GradientAscent,
    "finetune": FineTune,
    "esd": ESD,
    "uce": UCE,
    "concept-ablation": ConceptAblation,
    "erasediff": EraseDiff,
    "selective-amnesia": SelectiveAmnesia,
    "forget-me-not": ForgetMeNot,
    "sld": SLD,
}
