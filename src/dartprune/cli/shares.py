"""A comparison by several processes at once: each decodes with some of the arms, on a share of the cores."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dartprune.errors import UserError

if TYPE_CHECKING:
    from dartprune.evaluation.arms import Arm
    from dartprune.evaluation.compare.outcomes import Comparison
    from dartprune.evaluation.compare.plan import Material, Plan
    from dartprune.reporting.journal import Journal

JOURNAL = "journal.jsonl"
PART = "journal.part-*.jsonl"  # of the other processes


@dataclass(frozen=True)
class Job:
    """A comparison as a process of its own can begin it.

    model, dtype, device: as on the command line.  documents, calibrating: texts by domain.  names: of the arms.
    backend: whose bytes are counted.  plugins: files that are run first.
    """

    model: str | None
    dtype: str
    device: str | None
    documents: dict[str, list[str]]
    calibrating: dict[str, list[str]]
    plan: Plan
    names: list[str]
    backend: str
    plugins: tuple[Path, ...] = ()

    def begin(self) -> Begun:
        """Load the model and lay out the streams."""
        from dartprune.evaluation.compare.plan import material
        from dartprune.loading import load

        model, tokenizer = load(self.model, dtype=self.dtype, device=self.device)
        arms = _arms(self.names, model, tokenizer, self.calibrating)
        return Begun(self, model, arms, material(self.documents, tokenizer, self.plan))


@dataclass(frozen=True)
class Begun:
    """A comparison with its model in memory."""

    job: Job
    model: Any
    arms: list[Arm]
    material: Material

    def journal(self, path: Path) -> Journal:
        """The journal of this comparison; ValueError for a file of another one."""
        from dartprune.evaluation.compare.run import journal_settings
        from dartprune.reporting.journal import Journal

        return Journal(path, journal_settings(self.model, self.material, self.job.plan, self.job.backend))

    def compare(self, arms: list[Arm], journal: Journal, watcher: Any = None) -> Comparison:
        """Decode what the journal does not hold."""
        from dartprune.evaluation.compare.run import compare

        job = self.job
        return compare(self.model, arms, self.material, job.plan, journal=journal, backend=job.backend, watcher=watcher)


def compared(job: Job, out: Path, processes: int, *, silent: bool) -> Comparison:
    """Run a comparison, with its units kept in a folder.

    Args:
        job: what is compared.
        out: the folder; what it holds already is not done again, also what other processes left there.
        processes: how many decode at once; no more than there are arms that prune.
        silent: show no progress.

    Raises:
        ValueError: what `compare` refuses; processes beside a GPU; what another process refused.
    """
    from dartprune.reporting.progress import bar

    begun = job.begin()
    pruning = [arm for arm in begun.arms if arm.prunes]
    processes = max(1, min(processes, len(pruning)))
    if processes > 1 and begun.model.device.type != "cpu":
        raise UserError(
            f"--processes shares the cores of a CPU out, the model is on {begun.model.device}: leave it out"
        )
    journal = begun.journal(out / JOURNAL)
    _adopt(begun, journal, out)
    with bar("comparing", 0, silent=silent) as work:
        if processes == 1:
            return begun.compare(begun.arms, journal, work)
        shares = [pruning[first::processes] for first in range(processes)]
        with _others(job, shares[1:], journal, out) as others:
            begun.compare(shares[0], journal, work)
            work.tell("waiting for the other processes")
            for other in others:
                other.end()
        _adopt(begun, journal, out)
    return begun.compare(begun.arms, journal)


def _adopt(begun: Begun, journal: Journal, out: Path) -> None:
    for path in sorted(out.glob(PART)):
        journal.adopt(begun.journal(path))
        path.unlink()


def _arms(names: list[str], model: Any, tokenizer: Any, calibrating: dict[str, list[str]]) -> list[Arm]:
    from dartprune.evaluation.arms import arm
    from dartprune.evaluation.calibration import Calibration, cut
    from dartprune.evaluation.texts import opening

    if not calibrating:
        return [arm(name) for name in names]
    tokens: list[int] = []
    for text in (text for domain in calibrating.values() for text in domain):
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    made = Calibration(model, cut(tokens, opening(tokenizer)))
    return [arm(name, made) for name in names]


@dataclass
class _Other:
    """A process that works on a share, and the line by which it says how that ended."""

    process: Any
    line: Connection

    def end(self) -> None:
        """Wait for it; ValueError for what it refused, RuntimeError if it failed."""
        try:
            refused = self.line.recv()
        except EOFError:  # it is gone, and refused nothing
            refused = None
        self.process.join()
        if refused is not None:
            raise UserError(refused)
        if self.process.exitcode:
            raise RuntimeError(f"a process of the comparison failed with code {self.process.exitcode}, see above")


@contextmanager
def _others(job: Job, shares: list[list[Arm]], journal: Journal, out: Path) -> Iterator[list[_Other]]:
    """Processes for further shares; the cores are shared out, and given back afterwards."""
    import torch

    # a fresh interpreter: torch's threads do not survive a fork
    fresh = multiprocessing.get_context("spawn")
    cores = torch.get_num_threads()
    threads = max(1, cores // (len(shares) + 1))
    known = {key: journal[key] for key in journal}
    started: list[_Other] = []
    try:
        for number, share in enumerate(shares, 1):
            line, end = fresh.Pipe(duplex=False)
            part = out / PART.replace("*", str(number))
            given = replace(job, names=[arm.name for arm in share]), part, known, threads, end
            process = fresh.Process(target=_work, args=given, daemon=True)
            process.start()
            end.close()
            started.append(_Other(process, line))
        torch.set_num_threads(threads)
        yield started
    finally:
        torch.set_num_threads(cores)
        for other in started:
            other.process.terminate()
            other.process.join()


def _work(job: Job, part: Path, known: dict[str, Any], threads: int, line: Connection) -> None:
    """What another process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process hears it, and ends this one
    import torch

    from dartprune.cli.options import quiet
    from dartprune.cli.plugins import run_plugins

    torch.set_num_threads(threads)
    quiet()
    try:
        run_plugins(job.plugins)
        begun = job.begin()
        journal = begun.journal(part)
        journal.learn(known)
        begun.compare(begun.arms, journal)
    except UserError as error:
        line.send(str(error))
