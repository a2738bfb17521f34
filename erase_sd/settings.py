"""Options of the main job that belong to no method: what to erase, how to run it, what to learn from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from erase_sd.common.cli import at_least, knob
from erase_sd.common.errors import UserError

SINGLE_FILES = (".safetensors", ".ckpt")
SD_V1 = "CompVis/stable-diffusion-v1-4"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to erase from which model, and where the result goes."""

    concept: tuple[str, ...] = knob(
        (), 'what to forget: words ("cat", "neon style") or a concept file, by name ("nudity") or path; or several'
    )
    model: str = knob(
        SD_V1,
        "diffusers folder, Hub id or single .safetensors file, or 'pocket', the embedded model",
        ("pretrained_model_name_or_path",),
    )
    model_config: str | None = knob(None, "how a single-file model is laid out: folder or Hub id of its base model")
    unet: str | None = knob(
        None, "erase from this UNet in the model: run or UNet folder, Hub id, or a file (ESD, UCE)"
    )
    text_encoder: str | None = knob(None, "erase from the model with this text encoder: folder or file (AdvUnlearn)")
    adapter: tuple[str, ...] = knob((), "erase from the model with these LoRA or SPM adapters in it: FILE or FILE@0.5")
    method: str = knob("scissorhands", "how to erase; --method NAME --help shows the options of that one")
    preset: str | None = knob(None, "named set of all other values; by default the one measured best for the model")
    kind: Literal["auto", "object", "style", "background", "attribute", "person"] = knob(
        "auto", "what the concept is; auto goes by its wording, concept files and lists of painters and celebrities"
    )
    anchor: tuple[str, ...] = knob(
        (), "what the model may show instead: a caption (pocket model: another word of the kind), or one per concept"
    )
    output_dir: str | None = knob(None, "where the run goes (default: runs/<concept>-<method>)")
    seed: int = knob(0, "seed of every random draw")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = knob(
        None, "autocast; by default accelerate's setting, else bf16 on a GPU that has it; fp16 is refused"
    )
    weights_dtype: Literal["float32", "bfloat16"] = knob(
        "float32",
        "the network's weights while it is trained, and in the result; bfloat16 takes --rounding kahan unless told",
    )
    low_memory: bool = knob(
        False,
        "what a 12 GB card needs: bf16 weights in two halves, 8-bit Adam, the original model's answers computed first",
    )
    fsdp: bool = knob(False, "divide the network among the processes (FSDP2) instead of copying it to each")
    gradient_checkpointing: bool = knob(
        False, "compute activations twice instead of keeping them; where not even one sample fits, it comes by itself"
    )
    forget_data: str | None = knob(
        None, "folder of your own pictures of the concept, with captions or without, instead of sampled ones"
    )
    retain_prompts: str | None = knob(None, "file of your own retain prompts, .txt or .csv, to sample from")
    retain_data: str | None = knob(None, "folder of your own retain pictures, with captions, instead of sampled ones")
    picture_steps: int | None = knob(
        None, "denoising steps of the images before and after, not of the pocket model's (default: 30; SD3, Flux 28)"
    )
    eval_forget: int = knob(128, "images scored on the concept's prompts, pocket model only")
    eval_retain: int = knob(320, "images scored on the other prompts, pocket model only")
    score: bool = knob(True, "draw and judge those images, before and after; --no-score measures nothing")

    def __post_init__(self) -> None:
        """Raise UserError for numbers outside their range."""
        at_least(self, 0, "seed", "eval_forget", "eval_retain")
        if self.picture_steps is not None:
            at_least(self, 1, "picture_steps")
        if self.retain_prompts and self.retain_data:
            raise UserError("--retain_prompts and --retain_data both say what to keep: give one of them")
        if self.model_config and Path(self.model).suffix not in SINGLE_FILES:
            raise UserError(f"--model_config is of a model in a single file, and {self.model} is none: leave it out")
        if len(self.anchor) not in (0, 1, len(self.concept)):
            counts = f"{len(self.anchor)} anchors for {len(self.concept)} concepts"
            raise UserError(f"--anchor {' '.join(map(repr, self.anchor))}: {counts}; give one, or one per concept")
        for text in self.concept:
            if self.concept.count(text) > 1:
                raise UserError(f"--concept names {text!r} twice: name each concept once")

    def has_own_data(self) -> bool:
        """Return whether the user brings pictures or prompts."""
        return any((self.forget_data, self.retain_prompts, self.retain_data))

    def anchors(self) -> tuple[str | None, ...]:
        """Return one anchor per concept; None leaves the choice to the concept."""
        if len(self.anchor) > 1:
            return self.anchor
        return (self.anchor or (None,)) * len(self.concept)


@dataclass(frozen=True, kw_only=True)
class Running:
    """How the job is carried out: nothing here changes what it computes."""

    checkpointing_steps: int = knob(25, "steps, or sensitivity batches, between two checkpoints")
    checkpoints_total_limit: int | None = knob(
        1, "newest checkpoints kept, none for all; they go when the results are written"
    )
    resume_from_checkpoint: str | None = knob(
        "latest", "checkpoint of --output_dir to go on from; none starts over, a complete run stays as it is"
    )
    report_to: (
        Literal["tensorboard", "wandb", "trackio", "aim", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab"] | None
    ) = knob(None, "tracker that gets the configuration and every step; its files go to <output_dir>/logs")
    dry_run: bool = knob(False, "print sizes, peak memory, steps and images of the job, and do nothing")

    def __post_init__(self) -> None:
        """Raise UserError for numbers outside their range."""
        at_least(self, 1, "checkpointing_steps")
        if self.checkpoints_total_limit is not None:
            at_least(self, 1, "checkpoints_total_limit")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The model's own images, sampled once, from which it learns."""

    forget_images: int = knob(256, "images of the concept; those of --forget_data are all taken")
    retain_images: int = knob(512, "images of everything else")
    anchor_pictures: bool = knob(False, "sample the anchors' images as well and fit redirect on both, half and half")
    resolution: int | None = knob(None, "side of the images in pixels, a multiple of 16 (default: the model's own)")
    sample_steps: int | None = knob(None, "denoising steps per image (default: SD 20, SDXL 25, SD3 and Flux 28)")
    sample_guidance: float | None = knob(
        None, "guidance scale, of Flux also in training (default: SD 7.5, SDXL 5, SD3 7, Flux 3.5)"
    )
    sample_batch_size: int = knob(32, "images sampled at a time; changes no image")

    def __post_init__(self) -> None:
        """Raise UserError for numbers outside their range."""
        at_least(self, 1, "forget_images", "retain_images", "sample_batch_size")
        if self.sample_steps is not None:
            at_least(self, 1, "sample_steps")
        if self.sample_guidance is not None:
            at_least(self, 0, "sample_guidance")
        if self.resolution is not None and (self.resolution < 16 or self.resolution % 16):
            raise UserError(f"--resolution {self.resolution} is no multiple of 16: give one, such as 512")


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What the model is asked to forget and to keep."""

    batch_size: int = knob(16, "samples of each set per step, over all processes", ("train_batch_size",))
    gradient_accumulation_steps: int = knob(
        1, "micro-batches in which a batch is computed, at first: twice as many whenever memory runs out"
    )
    trim_scope: str = knob("attn", "parameters that may be re-initialised: a named group or re:<regex>; norms never")
    rank_scope: str | None = knob(None, "parameters among which the top k is taken (default: those of trim_scope)")
    train_scope: str = knob("full", "parameters that are trained: a named group or re:<regex>")
    anchor_model: Literal["original", "current"] = knob("original", "network that says what the anchor looks like")
    redirect_draws: int = knob(
        1, "timesteps drawn for a redirect sample, of which the noisiest counts: layout and ground are decided there"
    )
    drop_captions: float = knob(0.1, "share of retain samples without caption, which guidance needs, in [0, 1]")

    def __post_init__(self) -> None:
        """Raise UserError for numbers outside their range."""
        at_least(self, 1, "batch_size", "gradient_accumulation_steps", "redirect_draws")
        if not 0 <= self.drop_captions <= 1:
            raise UserError(f"--drop_captions {self.drop_captions} is outside [0, 1]")
