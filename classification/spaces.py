"""Where the search looks for each method's knobs. Every method gets the same number of draws from its own space."""

from typing import NamedTuple


class Log(NamedTuple):
    """Uniform in the logarithm, from low to high."""

    low: float
    high: float


EPOCHS = (2, 5, 10)
SPACES: dict[str, dict[str, Log | tuple]] = {
    "ft": {"lr": Log(1e-3, 2e-1), "epochs": EPOCHS},
    "ga": {"lr": Log(1e-4, 0.3), "epochs": EPOCHS},
    "iu": {"alpha": Log(0.1, 1000)},
    "be": {"lr": Log(1e-5, 1e-1), "epochs": EPOCHS},
    "bs": {"lr": Log(1e-5, 1e-1), "epochs": EPOCHS},
    "l1-sparse": {"lr": Log(1e-3, 2e-1), "l1": Log(1e-6, 1e-3), "epochs": EPOCHS},
    "salun": {"lr": Log(1e-4, 1e-1), "mask_fraction": (0.1, 0.3, 0.5, 0.8), "redirect_weight": Log(0.03, 1)}
    | {"epochs": EPOCHS},
    "neggrad+": {"lr": Log(1e-3, 1e-1), "alpha": (0.8, 0.9, 0.95, 0.99, 0.999), "epochs": EPOCHS},
    "scrub": {"lr": Log(1e-3, 0.3), "max_epochs": (1, 2, 3), "alpha": (0.05, 0.5, 1.0), "epochs": EPOCHS},
    "ssd": {"alpha": Log(1, 100), "lam": Log(0.1, 1)},
    "scissorhands": {"lr": Log(1e-3, 1e-1), "fraction": Log(1e-3, 1e-1), "lam": Log(3e-3, 0.3), "epochs": EPOCHS}
    | {"release_at": Log(0.02, 10)},
}
