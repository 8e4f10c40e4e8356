"""What people see: tables and short messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.plugin import GROUPS, KINDS, REGISTRY, Facts

if TYPE_CHECKING:
    from bench.launcher import Ended
    from bench.live import Snapshot
    from bench.planner import Planned
    from bench.results import Result

STYLES = {"run": "bold", "done": "green", "ok": "green", "n/a": "dim", "left": "dim", "failed": "red",
          "missing": "yellow", "running": "cyan"}


def out() -> Console:
    """Standard output; as wide as the words need where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def err() -> Console:
    """Standard error, for messages: they are wrapped by the terminal, never cut."""
    return Console(stderr=True, soft_wrap=True)


def show_error(message: str) -> None:
    err().print(f"[red]error[/red] {escape(message)}", highlight=False)


def show_warnings(lines: Sequence[str]) -> None:
    for line in lines:
        err().print(f"[yellow]warning[/yellow] {escape(line)}", highlight=False)


def show_note(line: str) -> None:
    err().print(escape(line), highlight=False)


def show_lines(lines: Iterable[str]) -> None:
    """Plain lines on standard output, each as long as it is."""
    for line in lines:
        out().print(escape(line), highlight=False, soft_wrap=True)


def table(*columns: str, title: str = "") -> Table:
    """A table without boxes, whose words may wrap but are never cut."""
    made = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def styled(status: str) -> str:
    style = STYLES.get(status, "")
    return f"[{style}]{status}[/{style}]" if style else status


def show_plan(planned: Sequence[Planned]) -> None:
    """Every cell with what will happen to it, and the counts."""
    rows = table("plan", "cell", "defense", "purifier", "attack", "model", "data", "seed", "reason")
    for one in planned:
        cell = one.cell
        rows.add_row(styled(one.todo), cell.id, *(escape(cell.shown(k)) for k in ("defense", "purifier", "attack")),
                     escape(cell.model), escape(cell.shown("data")), str(cell.seed), escape(one.reason))
    out().print(rows)
    out().print(f"{len(planned)} cells: {counted(one.todo for one in planned)}", highlight=False)


def counted(words: Any) -> str:
    """"3 run, 1 n/a"."""
    return ", ".join(f"{number} {word}" for word, number in Counter(words).items()) or "none"


def show_failures(wrong: Sequence[Ended], unrun: int, results: Path) -> None:
    for one in wrong:
        err().print(f"[red]failed[/red] {escape(one.cell.title())}: {escape(one.reason)}\n"
                    f"       {escape(str(one.cell.folder(results)))}", highlight=False)
    started = f", {unrun} not started" if unrun else ""
    err().print(f"{len(wrong)} cells failed{started}. The same command runs only what is missing.", highlight=False)


def show_result(result: Result, folder: Path) -> None:
    """The measurements of one cell."""
    rows = table("metric", "value", "95 % interval", "n", "unit", "better", "reason")
    for one in result.measurements:
        better = {True: "higher", False: "lower", None: ""}[one.higher_is_better]
        interval = "" if one.low is None else f"{one.low:.4g} – {one.high:.4g}"
        value = "" if one.value is None else f"{one.value:.4g}"
        rows.add_row(escape(one.name), value, interval, str(one.n), escape(one.unit), better, escape(one.reason))
    out().print(rows)
    if result.stamp:
        out().print(escape(result.stamp), style="italic")
    out().print(f"{result.status} · {folder}", highlight=False, soft_wrap=True)


def show_status(snapshot: Snapshot) -> None:
    """Every planned cell of a suite with the state of its result, and who is at work on it."""
    rows = table("status", "cell", "what", "reason")
    for state in snapshot.states:
        rows.add_row(styled(state.status), state.cell, escape(state.title), escape(state.reason))
    out().print(rows)
    if snapshot.work:
        out().print(_work(snapshot))
    out().print(f"{len(snapshot.states)} cells: {status_line(snapshot)}", highlight=False)


def _work(snapshot: Snapshot) -> Table:
    rows = table("running", "for", "builds", "since", "where")
    for one in snapshot.work:
        rows.add_row(escape(one.title), duration(one.seconds), escape(one.stage),
                     duration(one.stage_seconds) if one.stage else "", escape(str(one.owner)))
    return rows


def status_line(snapshot: Snapshot) -> str:
    """"3 ok, 2 running, 1 missing · 3 to do, about 5 min"."""
    said = counted(state.status for state in snapshot.states)
    eta = snapshot.eta()
    if snapshot.left():
        said += f" · {snapshot.left()} to do" + (f", about {duration(eta)}" if eta is not None else "")
    if snapshot.left() and not snapshot.alive():
        said += "; no sweep is at work: the same command again runs what is missing"
    return said


def watch_status(snapshots: Iterable[Snapshot]) -> Snapshot | None:
    """Draw a suite anew with each snapshot: its counts, what runs and what failed. Where standard output is no
    terminal, a line whenever the counts change. Returns the last one."""
    console = out()
    return _draw(snapshots, console) if console.is_terminal else _tell(snapshots, console)


def _draw(snapshots: Iterable[Snapshot], console: Console) -> Snapshot | None:
    from rich.live import Live

    last: Snapshot | None = None
    with Live(console=console, auto_refresh=False) as drawn:
        for last in snapshots:
            drawn.update(_standing(last, console.height), refresh=True)
    return last


def _tell(snapshots: Iterable[Snapshot], console: Console) -> Snapshot | None:
    said: dict[str, int] | None = None
    last: Snapshot | None = None
    for last in snapshots:
        if said != last.count():
            said = last.count()
            console.print(status_line(last), highlight=False)
    return last


def _standing(snapshot: Snapshot, height: int) -> Any:
    from rich.console import Group

    wrong = [state for state in snapshot.states if state.status == "failed"]
    rows = table("failed", "reason")
    for state in wrong[-max(1, height - len(snapshot.work) - 6):]:
        rows.add_row(escape(state.title), escape(state.reason))
    parts: list[Any] = [f"{len(snapshot.states)} cells: {status_line(snapshot)}"]
    return Group(*parts, *([_work(snapshot)] if snapshot.work else []), *([rows] if wrong else []))


def show_plugins(kinds: Sequence[str] = KINDS) -> None:
    """All plugins of these kinds with their facts and first sentence."""
    for kind in kinds:
        rows = table("name", "track", "needs", "knows", "what you get", title=f"[bold]{GROUPS.get(kind, kind)}[/bold]")
        for name in REGISTRY.names(kind):
            facts = REGISTRY.facts[kind, name]
            rows.add_row(escape(name), _tracks(facts), ", ".join(facts.needs), ", ".join(facts.knows),
                         escape(facts.summary))
        out().print(rows)
        out().print()


def _tracks(facts: Facts) -> str:
    from bench.plugin import TRACKS

    return "all" if set(facts.track) == set(TRACKS) else ", ".join(facts.track)


def show_plugin(facts: Facts, cls: type) -> None:
    """Facts, docstring and options of one plugin."""
    import inspect

    console = out()
    console.print(f"[bold]{facts.kind}/{facts.name}[/bold]")
    console.print(escape(inspect.getdoc(cls) or "").replace("``", "`"), highlight=False)
    console.print()
    about = table("fact", "value")
    for name, value in _facts(facts).items():
        about.add_row(name, escape(value))
    console.print(about)
    console.print()
    console.print(_options(facts, cls))


def _facts(facts: Facts) -> dict[str, str]:
    shown = {f.name: getattr(facts, f.name) for f in fields(facts) if f.name not in ("kind", "name", "summary")}
    return {name: ", ".join(value) if isinstance(value, tuple) else str(value)
            for name, value in shown.items() if value not in ("", (), False)}


def _options(facts: Facts, cls: type) -> Table:
    prefix = f"metrics.{facts.name}" if facts.kind == "metric" else facts.kind
    rows = table("option", "type", "default")
    for one in fields(cls):
        rows.add_row(f"{prefix}.{one.name}", escape(_type(one)), escape(repr(_default(one))))
    return rows


def _type(one: Field[Any]) -> str:
    return one.type if isinstance(one.type, str) else getattr(one.type, "__name__", str(one.type))


def _default(one: Field[Any]) -> Any:
    return one.default_factory() if one.default_factory is not MISSING else one.default


def duration(seconds: float) -> str:
    """Seconds as people say them: 8 s, 3 min, 1 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
