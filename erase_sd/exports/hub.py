"""A repository on the Hugging Face Hub: the pipeline with its model card, private unless asked otherwise.

A run that stores guidance beside its network is pushed as its network and that file, which this project loads.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from erase_sd.common.errors import UserError
from erase_sd.exports.base import Erased, ExportSettings
from erase_sd.exports.pipeline import loading, save_pipeline
from erase_sd.models import guidance
from erase_sd.models.pipeline import save_network

CARD = "README.md"
REPO = re.compile(r"[\w.-]+/[\w.-]+")


def push(erased: Erased, output: Path, settings: ExportSettings) -> list[str]:
    """Push to `settings.repo`; `output` is not used. Raises UserError for what the Hub refuses.

    The card is the run's own with the lines that load it from the Hub. Who is asking is known from `hf auth login`.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    check_repo(output, settings)
    repo = settings.repo
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        use = stage(erased, folder, repo, settings)
        api = HfApi()
        try:
            api.create_repo(repo, private=not settings.public, exist_ok=True)
            if not settings.public and not api.repo_info(repo).private:
                raise UserError(f"--repo {repo} exists and everybody sees it: give --public too, or another name")
            api.upload_folder(repo_id=repo, folder_path=root, commit_message=f"{erased.name} erased")
        except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--repo {repo} cannot be pushed to ({reason}): check hf auth login") from error
    seen = "public" if settings.public else "private"
    return [f"https://huggingface.co/{repo}: pushed, {seen}", "", use]


def check_repo(output: Path, settings: ExportSettings) -> None:
    """Raise UserError for a repository that is missing or no owner/name."""
    if settings.repo is None:
        raise UserError("--to hub does not know where: give --repo owner/name")
    if not REPO.fullmatch(settings.repo):
        raise UserError(f"--repo {settings.repo!r} is no repository: give owner/name")


def stage(erased: Erased, folder: Path, repo: str, settings: ExportSettings) -> str:
    """Write what is pushed into an empty folder and return the lines that load it from `repo`."""
    if erased.guidance:
        save_network(erased.network, folder, erased.part)
        guidance.save(erased.guidance, folder)
        use = (
            "import torch\n"
            "from erase_sd.models.pipeline import load\n\n"
            f"pipe = load({erased.base!r}, {erased.part}={repo!r}, dtype=torch.float32)"
        )
    else:
        save_pipeline(erased.pipe, folder, settings)
        use = loading(erased.pipe, repo, settings)
    if erased.folder and (erased.folder / CARD).is_file():
        card = (erased.folder / CARD).read_text(encoding="utf-8")
        (folder / CARD).write_text(published_card(card, use, erased.folder, repo), encoding="utf-8")
    return use


def published_card(card: str, use: str, folder: Path, repo: str) -> str:
    """Return a run's card with the code that loads it from the Hub, and without paths of this machine."""
    card = re.sub(r"```python\n.*?```", lambda _: f"```python\n{use}\n```", card, count=1, flags=re.DOTALL)
    for path in (folder.resolve(), folder):
        if len(path.parts) > 1:
            card = card.replace(str(path), repo)
    return card.replace(str(Path.home()), "~")
