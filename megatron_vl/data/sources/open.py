"""One entry for all formats: paths in, a `record.Source` out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from megatron_vl.data.sources.files import IndexedFiles, expand_paths
from megatron_vl.data.sources.gui import load_schema
from megatron_vl.data.sources.html_rules import DEFAULT_RULE, HtmlRule
from megatron_vl.data.sources.html_source import SUFFIXES as PAGE_SUFFIXES
from megatron_vl.data.sources.html_source import HtmlSource
from megatron_vl.data.sources.index_build import Say, index_files, say_on_stderr
from megatron_vl.data.sources.index_file import FileIndex, Scan
from megatron_vl.data.sources.lines import LINE_FORMATS, LINES_KIND, LineSource, scan_lines
from megatron_vl.data.sources.megatron_bin import MegatronSource, TokenRule
from megatron_vl.data.sources.parquet import SUFFIXES as TABLE_SUFFIXES
from megatron_vl.data.sources.parquet import TABLE_KIND, TableSource, import_pyarrow, scan_table, table_files
from megatron_vl.data.sources.record import Source
from megatron_vl.data.sources.tar_scan import TAR_KIND, scan_tar
from megatron_vl.data.sources.webdataset import WebDatasetSource
from megatron_vl.errors import ConfigError, DataError

FORMATS = ("auto", "jsonl", "sharegpt", "gui", "html", "webdataset", "megatron", "parquet")
_BY_SUFFIX = {
    ".jsonl": "jsonl",
    ".tar": "webdataset",
    ".bin": "megatron",
    ".idx": "megatron",
    **dict.fromkeys(PAGE_SUFFIXES, "html"),
    **dict.fromkeys(TABLE_SUFFIXES, "parquet"),
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".tgz", ".zip")
_MOST_FILES_LOOKED_AT = 10_000


def open_source(
    paths: str | os.PathLike | Sequence[str | os.PathLike],
    format: str = "auto",
    *,
    cache_dir: str | None = None,
    index_workers: int = 1,
    if_stale: str = "rebuild",
    say: Say = say_on_stderr,
    action_schema: str | None = None,
    html_rule: HtmlRule = DEFAULT_RULE,
    token_rule: TokenRule | None = None,
) -> Source:
    """The samples of files or folders of one format, as one list in the order given (folders sorted).

    format: one of FORMATS; `auto` goes by the ends of the file names, and never means `sharegpt` or `gui`.
    cache_dir, index_workers, if_stale, say: see `index_build.index_files`; cache_dir=None indexes anew at
    every start. action_schema: file for `gui`. html_rule: limits for `html`. token_rule: needed for
    `megatron`, mostly `TokenRule.for_model(model)`.
    Raises ConfigError for an unknown or missing choice, DataError for files that cannot be used.
    """
    paths = [os.fspath(paths)] if isinstance(paths, (str, os.PathLike)) else list(map(os.fspath, paths))
    if format not in FORMATS:
        raise ConfigError(f"format = {format}: must be one of {', '.join(FORMATS)}")
    guessed = format == "auto"
    if guessed:
        format = format_of(paths)
    if action_schema is not None and format != "gui":
        raise ConfigError(f"action_schema = {action_schema}: is read for format gui only, this is {format}")

    def indexed(scan: Callable[[str], Scan], kind: str, files: list[str]) -> list[FileIndex]:
        return index_files(files, scan, kind, cache_dir, index_workers, if_stale, say)

    if format in LINE_FORMATS:
        if format == "gui" and action_schema is None:
            raise ConfigError("format = gui needs action_schema: the file that lists the actions")
        schema = load_schema(action_schema) if action_schema is not None else None
        source = LineSource(
            indexed(scan_lines, LINES_KIND, expand_paths(paths, (".jsonl",), "JSONL")), format, schema
        )
        if guessed:
            _refuse_sharegpt(source)
        return source
    if format == "webdataset":
        return WebDatasetSource(indexed(scan_tar, TAR_KIND, expand_paths(paths, (".tar",), "tar")))
    if format == "parquet":
        import_pyarrow()
        return TableSource(indexed(scan_table, TABLE_KIND, table_files(paths)))
    if format == "html":
        return HtmlSource(paths, html_rule)
    if token_rule is None:
        raise ConfigError("format = megatron needs token_rule: the vocabulary that ids are checked against")
    pairs = [
        file
        for path in paths
        for file in (expand_paths([path], (".bin",), ".bin") if os.path.isdir(path) else [path])
    ]
    return MegatronSource(pairs, token_rule)


def format_of(paths: Sequence[str]) -> str:
    """The format that the names of files say. Raises DataError when they say none, or several."""
    found: dict[str, str] = {}
    for path in paths:
        for file in _names(path):
            suffix = os.path.splitext(file)[1].lower()
            if suffix in _BY_SUFFIX:
                found.setdefault(_BY_SUFFIX[suffix], file)
            elif suffix in _COMPRESSED:
                found.setdefault("compressed", file)
    if "compressed" in found and len(found) == 1:
        raise DataError(f"{found['compressed']}: compressed; unpack it, since samples are read by offset")
    found.pop("compressed", None)
    if len(found) == 1:
        return next(iter(found))
    if not found:
        raise DataError(
            f"{', '.join(paths)[:200] or 'no path'}: no format is known by this name; known are "
            f"{', '.join(_BY_SUFFIX)}; give format = one of {', '.join(FORMATS[1:])}"
        )
    shown = "; ".join(f"{name}: {file}" for name, file in found.items())
    raise DataError(f"files of several formats ({shown}); a source holds one: make each a source of its own")


def _names(path: str) -> list[str]:
    """The path itself, or names of files below a folder: enough to tell what it holds."""
    if not os.path.isdir(path):
        return [path]
    names: list[str] = []
    for place, folders, files in os.walk(path):
        folders.sort()
        names += [os.path.join(place, file) for file in sorted(files)]
        if len(names) > _MOST_FILES_LOOKED_AT:
            break
    return names


def _refuse_sharegpt(source: IndexedFiles) -> None:
    """With format = auto, says at once what would otherwise refuse every sample later."""
    head = source[0].data[:4096]
    source.close()
    if b'"conversations"' in head and b'"messages"' not in head and b'"from"' in head:
        raise DataError(
            f"{source.files[0].path}: its first line has the ShareGPT shape; give format = sharegpt, or gui"
        )
