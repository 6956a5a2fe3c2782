"""What --log names: where the rows of the training log go besides. Imported only when asked for.

Each takes rows as they come, means at the end, and `close`; runs/live.py drops one that raises, and asks it to `leave`
nothing behind that waits or speaks after the run. A tag is `<SAE>/<column>` or `<SAE>/<metric>`, its step the tokens of
training.
"""

from __future__ import annotations

import atexit
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 30.0  # seconds that wandb may take for its server's first answer, and at the end for what is not sent yet


class TensorBoard:
    """Events in <out>/tensorboard. A run that continues after `tokens` replaces what was written of later ones."""

    def __init__(self, out: Path, settings: dict, tokens: int):
        from torch.utils.tensorboard import SummaryWriter

        self.tokens = tokens
        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=tokens + 1, flush_secs=10)

    def rows(self, rows: list[dict]) -> None:
        """Rows of one interval."""
        self.tokens = rows[0]["tokens"]
        self._add(numbers(rows))

    def means(self, means_of_sae: dict[str, dict[str, float]]) -> None:
        """What final_info.json holds."""
        self._add(summary(means_of_sae))

    def _add(self, values: dict[str, float]) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, self.tokens)

    def close(self, finished: bool) -> None:
        """Write what is left."""
        self.writer.close()

    def leave(self) -> None:
        """Its thread ends with the process."""


class Wandb:
    """A run of Weights & Biases, in the mode that WANDB_MODE says, its files in <out>/wandb; continued by its id."""

    def __init__(self, out: Path, settings: dict, tokens: int):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # which would send our errors, too
        import wandb

        quiet = dict(silent=True, console="off", disable_git=True, disable_code=True, init_timeout=PATIENCE,
                     finish_timeout=PATIENCE)
        known = getattr(wandb.Settings, "model_fields", quiet)  # finish_timeout is younger than the rest
        quiet = {name: value for name, value in quiet.items() if name in known}
        self.hooks: list[Callable] = []
        with exits_noted(self.hooks):
            wandb.setup(wandb.Settings(silent=True))  # else it would ask for a key on a terminal, and wait
            self.run = wandb.init(project=os.environ.get("WANDB_PROJECT", "sae_experiment"), name=out.name,
                                  dir=str(out), id=kept_id(out / "wandb" / "run_id.txt"), resume="allow", reinit=True,
                                  config=settings, settings=wandb.Settings(**quiet))

    def rows(self, rows: list[dict]) -> None:
        """Rows of one interval."""
        self.run.log(numbers(rows), step=rows[0]["tokens"])

    def means(self, means_of_sae: dict[str, dict[str, float]]) -> None:
        """What final_info.json holds."""
        self.run.summary.update(summary(means_of_sae))

    def close(self, finished: bool) -> None:
        """Send what is left, for PATIENCE at most; `wandb sync` sends the rest."""
        within(PATIENCE + 5, lambda: self.run.finish(exit_code=0 if finished else 1))

    def leave(self) -> None:
        """Without what it would do at the process's exit: with a service that is gone that is a traceback, or no end"""
        for hook in self.hooks:
            atexit.unregister(hook)


KINDS = {"tensorboard": TensorBoard, "wandb": Wandb}


@contextmanager
def exits_noted(hooks: list[Callable]) -> Iterator[None]:
    """Note in `hooks` what is registered within for the process's exit."""
    register = atexit.register

    def noted(hook, *args, **kwargs):
        hooks.append(hook)
        return register(hook, *args, **kwargs)

    atexit.register = noted
    try:
        yield
    finally:
        atexit.register = register


def within(seconds: float, call: Callable[[], object]) -> None:
    """call(), and what it raises; TimeoutError where it has not come back by then."""
    raised: list[BaseException] = []

    def kept() -> None:
        try:
            call()
        except BaseException as error:  # noqa: B036  raised below
            raised.append(error)

    thread = threading.Thread(target=kept, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"not done after {seconds:g} s")
    if raised:
        raise raised[0]


def numbers(rows: list[dict]) -> dict[str, float]:
    """{tag: value} of what was measured in an interval."""
    return {f"{row['sae']}/{column}": value for row in rows for column, value in row.items()
            if column not in ("sae", "tokens") and value is not None}


def summary(means_of_sae: dict[str, dict[str, float]]) -> dict[str, float]:
    """{tag: value} of an SAE's means."""
    return {f"{sae}/{metric}": value for sae, means in means_of_sae.items() for metric, value in means.items()
            if value is not None}


def kept_id(file: Path) -> str:
    """The id in the file, a new one where there is none yet."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()
