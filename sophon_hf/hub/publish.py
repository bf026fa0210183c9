"""Publish a protected model: what may leave the machine, whether it is what the claim says, and one commit of it."""

from __future__ import annotations

import fnmatch
import glob
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

from sophon_hf.attacks.results import AttackResults
from sophon_hf.hub.card import CARD, update_card
from sophon_hf.hub.claim import FILE_NAME, AttackReport, Claim, hash_weights

logger = logging.getLogger(__name__)

# Named one by one: what is not known to be needed stays on the machine.
_ALLOWED = (
    *(CARD, FILE_NAME, "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "plots/*.png"),
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "model_index.json"),
    *("scheduler/scheduler_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja"),
)
# Of a pipeline, beside its scheduler.
_PARTS = (
    *("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2"),
    *("tokenizer_3", "feature_extractor", "image_encoder", "safety_checker"),
)
# Of an earlier commit's, so that the repository holds the weights of the claim and no others, in any format.
_REPLACED = [
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl"),
    *("*.h5", "*.h5.index.json", "*.msgpack", "*.msgpack.index.json", "*.onnx", "*.onnx_data", "*.gguf", "*.tflite"),
    *("*.ot", "plots/*"),
]
_LOG_IN = "Run `hf auth login` (or set HF_TOKEN) with a token that may write."


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    report: str | os.PathLike | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Publish the protected model",
) -> Any:
    """Upload a saved model in one commit, with card and claim.

    Args:
        folder: Where `SophonTrainer` saved it.
        repo_id: `user/name`; made where it does not exist.
        report: `output_dir` of `sophon-hf attack`: what it found goes into claim and card.
        private: Whether a new repository is private; the account's own setting where None.
        revision: Branch to commit to.
        commit_message: Of the commit.

    Returns:
        `huggingface_hub.CommitInfo`.

    Raises:
        FileNotFoundError: `folder` holds no protected model, or `report` no results.
        ValueError: The weights are not those of the claim, or the attacked ones are others.
        PermissionError: Not logged in, or not allowed to write there.
        ConnectionError: The Hub cannot be reached, or the upload broke off; then nothing is published.
    """
    folder = Path(folder)
    claim, results = _check_folder(folder), None
    if report is not None:
        claim, results = with_report(folder, claim, report)
    # Before anything is written: who is not logged in finds the folder as it was.
    repo_id = create_repository(repo_id, private)
    if not write_card_and_claim(folder, claim, repo_id, results):
        logger.warning(
            "%s was edited and is published as it is: make sure that it says what %s says, and that it names %s. Where "
            "you delete it, a new card is written.",
            folder / CARD,
            FILE_NAME,
            repo_id,
        )
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = [name for name in names if _is_published(name) and (claim.attacks is not None or "plots/" not in name)]
    if len(files) < len(names):
        logger.info("Not published: %s.", ", ".join(name for name in names if name not in files))
    with _helpful_errors(repo_id):
        return HfApi().upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in files],
            delete_patterns=_REPLACED,
            commit_message=commit_message,
            revision=revision,
        )


def publish_checkpoint(folder: str | os.PathLike, repo_id: str, iteration: int, revision: str | None = None) -> None:
    """Publish the model of a checkpoint while the protection goes on; a push that fails is logged and does not end it.

    Args:
        folder: The checkpoint; its states stay on the machine.
        repo_id: `user/name`.
        iteration: Whose state it is.
        revision: Branch to commit to.
    """
    message = f"Protection in progress, iteration {iteration}"
    try:
        publish(folder, repo_id, revision=revision, commit_message=message)
    except (OSError, ValueError) as error:
        logger.warning("%s: it was not pushed, training goes on. %s", message, error)


def _check_folder(folder: Path) -> Claim:
    """Return the claim of a saved model, if the weights beside it are those that it speaks of.

    Raises:
        FileNotFoundError: There is none.
        ValueError: They are not.
    """
    if not (folder / FILE_NAME).exists():
        raise FileNotFoundError(
            f"{folder} has no {FILE_NAME}, so it is not known what could be claimed of it: publish the folder that "
            "SophonTrainer or `sophon-hf protect` saved the protected model in."
        )
    claim, found = Claim.read(folder), hash_weights(folder)
    for name in sorted({*claim.weights, *found}):
        if claim.weights.get(name) != found.get(name):
            what = "is missing" if name not in found else "is new" if name not in claim.weights else "has changed"
            raise ValueError(
                f"{name} {what} since {FILE_NAME} was written, so the claim is not about these weights: save the model "
                "again."
            )
    return claim


def with_report(folder: Path, claim: Claim, report: str | os.PathLike) -> tuple[Claim, AttackResults]:
    """Return the claim with what attacks found, and their results; nothing is written.

    Args:
        folder: What the model is saved in.
        claim: Its claim.
        report: `output_dir` of `sophon-hf attack`, the folder of results.json in it, or the report inside that.

    Raises:
        FileNotFoundError: There are no results.
        ValueError: They are about another model.
    """
    report = Path(report)
    places = (report / "attacks", report, report.parent)
    path = next((place / "results.json" for place in places if (place / "results.json").exists()), None)
    if path is None:
        raise FileNotFoundError(f"{report} has no results.json: name the output_dir of `sophon-hf attack`.")
    results = AttackResults.load(path)
    attacked = results.facts.get("weights", {}).get("protected")
    if attacked != claim.state_hash:
        raise ValueError(
            f"{path} is about other weights ({attacked}) than those in {folder} ({claim.state_hash}): run `sophon-hf "
            f"attack --protected {folder}` and name its output_dir."
        )
    if results.metric != claim.metric:
        raise ValueError(f"{path} measures {results.metric}, the claim {claim.metric}.")
    return replace(claim, attacks=AttackReport.from_results(results)), results


def write_card_and_claim(folder: Path, claim: Claim, repo_id: str, results: AttackResults | None = None) -> bool:
    """Write the claim, the card that is filled from it, and the plots of its attacks; all or none.

    Args:
        folder: What the model is saved in.
        claim: Its claim.
        repo_id: What the card says to load.
        results: What the attacks found, where they are new.

    Returns:
        False where the card was edited and left as it is.
    """
    if results is not None:
        from sophon_hf.attacks.report import write_plots  # Who protects a model needs no matplotlib.

        write_plots(results, folder / "plots")
    # All that can fail, a full disk or a card that cannot be read, fails before the first of the two takes its place.
    staged = folder / f".{FILE_NAME}.new"
    try:
        claim.write(staged)
        unedited = update_card(folder, claim, repo_id)
        os.replace(staged, folder / FILE_NAME)
    finally:
        staged.unlink(missing_ok=True)
    return unedited


def _is_published(name: str) -> bool:
    """Return whether a file leaves the machine. Checkpoints, hidden files, pickles and logs do not."""
    allowed = any(fnmatch.fnmatchcase(name, pattern) for pattern in _ALLOWED)
    folder, _, file = name.rpartition("/")  # The asterisk of a pattern matches "/" too.
    part = folder in _PARTS and any(fnmatch.fnmatchcase(file, pattern) for pattern in _ALLOWED)
    return (part or (allowed and folder in ("", "scheduler", "plots"))) and not name.startswith(".")


def create_repository(repo_id: str, private: bool | None = None) -> str:
    """Make a model repository where there is none, and return its full id.

    Raises:
        PermissionError: Not logged in, or the repository is another owner's.
        ConnectionError: The Hub cannot be reached.
        ValueError: Not a valid id, or the repository is public and is to be private.
    """
    if get_token() is None:
        raise PermissionError(f"Not logged in to the Hub. {_LOG_IN}")
    with _helpful_errors(repo_id):
        repo_id = HfApi().create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not HfApi().model_info(repo_id).private:
            raise ValueError(
                f"{repo_id} exists and is public: make it private in its settings, or choose another name."
            )
        return repo_id


@contextmanager
def _helpful_errors(repo_id: str) -> Iterator[None]:
    """Turn what the client raises into errors that say what to do; no token is in them."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError) as raised:
        error: BaseException = raised
        if isinstance(error, RuntimeError) and isinstance(error.__cause__, (HTTPError, OSError)):
            error = error.__cause__  # How the client reports a large file that did not arrive.
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, LocalTokenNotFoundError):
            raise PermissionError(f"Not logged in to the Hub. {_LOG_IN}") from raised
        if isinstance(error, HfHubHTTPError) and status == 401:
            raise PermissionError(f"The Hub does not accept the token. {_LOG_IN}") from raised
        if isinstance(error, HfHubHTTPError) and status == 403:
            raise PermissionError(
                f"The account that is logged in may not write to {repo_id}: name a repository of your own, or log in "
                "as its owner (`hf auth login`)."
            ) from raised
        if isinstance(error, HfHubHTTPError):
            reason = error.server_message or status
            raise ConnectionError(f"The Hub refused {repo_id}: {reason}. Nothing is published.") from raised
        if isinstance(error, (HTTPError, ConnectionError, TimeoutError)):
            raise ConnectionError(
                f"The connection to the Hub failed ({type(error).__name__}), and nothing is published. Publishing "
                "again goes on with the large files that arrived."
            ) from raised
        raise
