"""`row_parts`: the rows of a table, each as a line that names its columns."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from m3runtime.documents.parts import Part


def row_parts(rows: Iterable[Sequence[str]], metadata: Mapping[str, str]) -> Iterator[Part]:
    """A line ``column: cell; column: cell`` for each row, so that every reference says what its cells are.

    The first row that is not blank has the names of the columns if all its cells are different and not numbers; else
    a line has its cells alone, and so has a table of one column or one row. ``row`` counts from 1, as spreadsheets do.
    """
    names: Sequence[str] | None = None
    first, alone = 0, False
    for number, row in enumerate(rows, 1):
        cells = [" ".join(cell.split()) for cell in row]
        if not any(cells):
            continue
        if names is None:
            names = cells if _are_names(cells) else ()
            if names:
                first, alone = number, True
                continue
        alone = False
        named = zip((*names, *[""] * (len(cells) - len(names))), cells, strict=False)
        line = "; ".join(f"{name}: {cell}" if name else cell for name, cell in named if cell)
        yield Part(f"{line}\n", {**metadata, "row": str(number)})
    if names and alone:
        yield Part(f"{'; '.join(filter(None, names))}\n", {**metadata, "row": str(first)})


def _are_names(cells: Sequence[str]) -> bool:
    used = [cell for cell in cells if cell]
    return len(used) > 1 and len(set(used)) == len(used) and not any(map(_is_number, used))


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(",", "").replace("%", ""))
    except ValueError:
        return False
    return True
