"""An erased model in the formats that other tools load: one format, one file."""

from erase_sd.exports.base import Format
from erase_sd.exports.delta import write_delta
from erase_sd.exports.hub import check_repo, push
from erase_sd.exports.lora import write_lora
from erase_sd.exports.pipeline import write_pipeline
from erase_sd.exports.pt import check_path, write_pt
from erase_sd.exports.single_file import write_single_file

FORMATS: dict[str, Format] = {
    "pipeline": Format(write=write_pipeline, several_dtypes=True),
    "single-file": Format(write=write_single_file, suffixes=(".safetensors",), networks=("unet",)),
    "delta": Format(write=write_delta, suffixes=(".safetensors",), dtypes=("fp32",), compares=True),
    "lora": Format(write=write_lora, compares=True),
    "pt": Format(write=write_pt, suffixes=(".pt", ".ckpt"), dtypes=("fp32",), networks=("unet",), check=check_path),
    "hub": Format(write=push, several_dtypes=True, guidance=True, local=False, check=check_repo),
}
