"""The part of docs/results.md on accuracy without retraining, from docs/measurements/accuracy/<case>.json."""

from __future__ import annotations

from typing import Any

from accuracy_tables import EPSILON, OWN, REFINED, REPAIRED, REPAIRS, Case, Cell, Table
from held_out import CHOOSE, CLEAN, CLEAN_REPORT, LEAST_WORDS, REPORT
from plot_accuracy import alt, file_name
from plots import markdown_table

#: Points that the default with REPAIRED may lose at most, by case and share of MACs kept.
TARGETS = {
    "minilm-stsb": {0.6: 0.0, 0.5: 0.2, 0.4: 0.3, 0.3: 0.8},
    "minilm-sst2": {0.6: 0.3, 0.5: 0.7, 0.4: 1.2, 0.3: 2.0},
    "resnet56-cifar10": {0.6: 0.5, 0.5: 1.0, 0.4: 2.5, 0.3: 6.0},
    "resnet56-cifar10-5k": {0.6: 0.5, 0.5: 1.0, 0.4: 2.5, 0.3: 6.0},
    "vit-cifar10": {0.6: 0.5, 0.5: 1.0, 0.4: 2.0, 0.3: 4.0},
    "deit-tiny": {0.7: 5.0, 0.5: 15.0},
}
ALL_ROWS = "all rows, which also chose the defaults"
HEAD = """\
## Accuracy without retraining

The tables show points lost against the unpruned torch model on held-out rows (negative: gained), by share of MACs
kept. A cell has the mean over seeds ± their standard deviation (no deviation: one seed), and in brackets a 95 %
interval by paired bootstrap over the rows (the mean of the seeds' intervals). `-`: not measured. Seeds choose the
calibration rows and all random numbers of scores and repair. Their spread does not include the uncertainty of the
held-out rows. Rows are resampled one by one: intervals are too narrow if rows depend on each other, like phrases of
one sentence. The smallest mean of a column is bold.

**Which rows.** The held-out rows of every case are split in two by their content (`tools/studies/held_out.py`: equal
rows, pairs that share a sentence and phrases of one sentence stay together). Defaults are chosen on the half
*choose*; its results have separate lines. Tables and targets use the half *report*. The defaults of this version
(`score: auto`, `gauss_newton: auto`, the shares of the loss curves and their rows) were chosen before that split, on
all rows, so the report half has been used once. Tables that were measured before the split have no halves: they say
"all rows, which also chose the defaults", and are not compared with others."""


def sections(measured: list[Case]) -> list[str]:
    """Lines of the page."""
    if not measured:
        return []
    lines = ["", *HEAD.splitlines(), *targets(measured), *choices(measured)]
    for case in measured:
        lines += ["", f"### {case.main.title} (`{case.name}`)"]
        for number, table in enumerate(case.tables):
            lines += [*_of_table(table), "", f"![{alt(table)}](figures/{file_name(case, number)})"]
    return lines


def _of_table(table: Table) -> list[str]:
    mark = [] if table.part else ["", f"**On {ALL_ROWS}**: measured before the rows were split."]
    return [*mark, "", facts(table), "", *accuracy_table(table), *_chosen(table), *clean(table), "", *losses(table)]


def facts(table: Table) -> str:
    """What was measured, on what: one line."""
    about, dates = table.document, sorted({row["written"] for row in table.rows})
    machine = table.rows[0]["machine"]
    cells = [len(cell.drops) for line in table.lines.values() for cell in line.values()]
    fewer = sum(count < len(table.seeds) for count in cells)
    rows = f"{about['held_out_rows']} held-out rows"
    if table.part:
        rows = f"the {about['parts'][table.part]} rows of the {table.part} half, of {rows}"
    return (
        f"{about['metric'].capitalize()} in points on {rows}, "
        f"unpruned {table.base:.2f}; "
        f"{about['calibration_rows']} calibration rows, {about['scoring_rows']} of them for the scores, "
        f"{about['curve_rows']} for the loss curves; "
        f"{'seeds' if len(table.seeds) > 1 else 'seed'} {', '.join(map(str, table.seeds))}"
        + (f" (fewer in {fewer} of {len(cells)} cells)" if fewer else "")
        + f"; {machine['cpu']}, {machine['threads']} {'thread' if machine['threads'] == 1 else 'threads'}, "
        f"torch {table.rows[0]['torch']}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."
    )


def accuracy_table(table: Table) -> list[str]:
    """Scorer x repair against budgets; the best of several means is bold (ties: all that are printed alike)."""
    means = {
        budget: [round(line[budget].drop, 2) for line in table.lines.values() if budget in line]
        for budget in table.budgets
    }
    rows = []
    for (scorer, repair), line in table.lines.items():
        cells = []
        for budget in table.budgets:
            cell = line.get(budget)
            best = cell is not None and len(means[budget]) > 1 and round(cell.drop, 2) == min(means[budget])
            cells.append("-" if cell is None else f"**{cell}**{_bounds(cell)}" if best else f"{cell}{_bounds(cell)}")
        rows.append([f"`{scorer}`", repair, *cells])
    return markdown_table(["scorer", "repair", *(f"{budget:g}" for budget in table.budgets)], rows)


def _bounds(cell: Cell) -> str:
    return f" ({cell.interval})" if cell.bounds else ""


def _chosen(table: Table) -> list[str]:
    """The other half's figures, in a line of their own."""
    if table.part != REPORT:
        return []
    other = table.on(CHOOSE)
    lines = [
        f"`{scorer}` {repair} " + ", ".join(f"{cell} at {budget:g}" for budget, cell in line.items())
        for (scorer, repair), line in other.lines.items()
    ]
    rows = table.document["parts"][CHOOSE]
    return ["", f"On the {rows} rows of the choose half (unpruned {other.base:.2f}): {'; '.join(lines)}."]


def clean(table: Table) -> list[str]:
    """Rows that the model was not fine-tuned on, apart, where some held-out rows are parts of training texts."""
    document = table.document
    if "training_texts" not in document:
        return []
    if table.part != REPORT:
        return ["", f"{training_texts(document)} Clean rows have not been measured apart here."]
    names = {REPORT: "report half", CLEAN_REPORT: "its clean rows", CLEAN: "clean rows of both halves"}
    rows = []
    for part, name in names.items():
        on = table.on(part)
        for (scorer, repair), line in on.lines.items():
            if (scorer, repair) == (table.scorer, table.repair):
                found = [line.get(budget) for budget in table.budgets]
                cells = ["-" if one is None else f"{one.accuracy:.2f}, {one} lost{_bounds(one)}" for one in found]
                rows.append([name, f"{document['parts'][part]}", f"{on.base:.2f}", *cells])
    head = ["rows", "number", "unpruned", *(f"{budget:g}" for budget in table.budgets)]
    return ["", training_texts(document), "", *markdown_table(head, rows)]


def training_texts(document: dict[str, Any]) -> str:
    """How many held-out rows the model has seen in training, as parts of its texts."""
    total, found = document["held_out_rows"], document["training_texts"]
    inside, holding = found["parts_of_training_texts"], found["holding_one"]
    return (
        f"**{inside} of the {total} held-out rows ({inside / total:.1%}) are parts of texts that the model was "
        f"fine-tuned on** (without case, spaces and punctuation). The other {total - inside} are the clean rows; but "
        f"{holding} of them are sentences that hold a training text of {LEAST_WORDS} words or more, so none of these "
        "figures is that of new sentences."
    )


def losses(table: Table) -> list[str]:
    """One sentence for each time another scorer beats OWN with the same repair by more than both deviations."""
    compared, lines, default = 0, [], table.scorer
    for (scorer, repair), line in table.lines.items():
        if scorer == OWN or repair == "none":
            continue
        for budget, cell in line.items():
            own = table.get(OWN, repair, budget)
            if own is None:
                continue
            compared += 1
            if own.drop - cell.drop > max(own.spread, cell.spread) + EPSILON:
                lines.append(
                    f"- At {budget:g} of the MACs, `{scorer}` beats `{OWN}` with {REPAIRS.get(repair, repair)}: "
                    f"it loses {cell} points, `{OWN}` {own} ({own.drop - cell.drop:.2f} more)."
                )
    if not any(scorer == OWN for scorer, _ in table.lines):
        return [f"`{OWN}` itself has not been measured here."]
    if not compared:
        return [f"No other scorer has been measured with the same repair as `{OWN}` yet."]
    rule = "by more than both standard deviations (0 where one seed was measured)"
    if not lines:
        return [f"In none of {compared} comparisons with the same repair does another scorer beat `{OWN}` {rule}."]
    return [
        f"Another scorer beats `{OWN}` {rule} in {len(lines)} of {compared} comparisons with the same repair:",
        "",
        *lines,
        *(["", f"`prune.score: auto`, the default, takes `{default}` for such models."] if default != OWN else []),
    ]


def targets(measured: list[Case]) -> list[str]:
    """The table of targets, for those cases that were measured."""
    rows, verdicts, fallen = [], [], []
    named = [TARGETS[one.name] for one in measured if one.name in TARGETS]
    budgets = sorted({budget for of_case in named for budget in of_case}, reverse=True)
    for case, table in ((one, table) for one in measured for table in (one.main, one.older) if table):
        if case.name not in TARGETS:
            continue
        cells = []
        for budget in budgets:
            target, cell = TARGETS[case.name].get(budget), table.get(table.scorer, table.repair, budget)
            if target is None:
                cells.append("-")
            elif cell is None:
                cells.append(f"- (target {target:.1f}: not measured)")
            else:
                missed = cell.drop - target
                verdicts.append((table.part, missed <= EPSILON))
                by = f"{missed:.2f}" if missed >= 0.005 else "less than 0.01"
                verdict = "met" if verdicts[-1][1] else f"missed by {by}"
                within = f"{cell.interval}; " if cell.bounds else ""
                cells.append(f"{cell.drop:z.2f} ({within}target {target:.1f}: {verdict})")
                if table.part and missed > EPSILON:
                    fallen += _met_elsewhere(case, budget, target, cell)
        names = [
            f"`{case.name}`",
            *([f"`{table.scorer}`"] if table.scorer != OWN else []),
            *([table.repair] if table.repair != REPAIRED else []),
        ]
        rows.append([", ".join(names), f"{table.part} half" if table.part else ALL_ROWS, *cells])
    if not rows:
        return []
    counts = [
        f"{words}: {sum(met for of, met in verdicts if of == part)} of {sum(of == part for of, _ in verdicts)} measured"
        for part, words in ((REPORT, "met on the report half"), (None, f"met on {ALL_ROWS}"))
        if any(of == part for of, _ in verdicts)
    ]
    return [
        "",
        "### Targets",
        "",
        f"Mean points lost by what `prune.score: auto` takes (`{OWN}` where no other is named) with "
        f"{REPAIRS[REPAIRED]}, and Gauss-Newton where that is named, against the most that it should lose; "
        f"{'; '.join(counts)}.",
        "",
        *markdown_table(["case", "rows", *(f"{budget:g}" for budget in budgets)], rows),
        *(["", *fallen] if fallen else []),
    ]


def _met_elsewhere(case: Case, budget: float, target: float, cell: Cell) -> list[str]:
    """A line if what misses the target on the report half meets it on all rows, of these models or of older ones."""
    table, found = case.main, []
    for words, other in (("on all rows", table.on(None)), ("by an older table of all rows", case.older)):
        there = None if other is None else other.get(other.scorer, other.repair, budget)
        if there is not None and there.drop - target <= EPSILON:
            found.append(f"{words} ({there})")
    if not found:
        return []
    return [f"- `{case.name}` at {budget:g}: missed on the report half ({cell}), met {' and '.join(found)}."]


def choices(measured: list[Case]) -> list[str]:
    """What the choose half alone says of `score: auto` and `gauss_newton: auto`."""
    rows, agree = [], 0
    for case in measured:
        if case.main.part != REPORT:
            continue
        table = case.main.on(CHOOSE)
        taken = (table.scorer, table.repair)
        for key, line in table.lines.items():
            scorer, repair = key
            other_repair = scorer == taken[0] and {repair, taken[1]} == {REPAIRED, REFINED}
            if not other_repair and not (scorer != taken[0] and repair == taken[1]):
                continue
            for budget, cell in line.items():
                own = table.get(*taken, budget)
                if own is None:
                    continue
                agree += own.drop <= cell.drop + EPSILON
                names = [" ".join((f"`{one}`", other)) for one, other in (taken, key)]
                rows.append([f"`{case.name}`", f"{budget:g}", names[0], f"{own}", names[1], f"{cell}"])
    if not rows:
        return []
    head = ["case", "MACs", "the default takes", "points lost", "instead", "points lost"]
    return [
        "",
        "### The defaults on the rows that choose",
        "",
        "`prune.score: auto` and `gauss_newton: auto` against what they could take instead, on the choose halves "
        f"alone: the default loses no more in {agree} of {len(rows)} comparisons. The sections on the loss curves say "
        "themselves which rows they were measured on.",
        "",
        *markdown_table(head, rows),
    ]
