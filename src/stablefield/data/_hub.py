"""Image data sets on the Hugging Face hub.

huggingface_hub downloads the files of one split, and the readers for local files open them, within their memory limits. Of
the files of a data set, the first of these that exist are read:

- parquet files, in the configurations and splits that the data set's card (README.md) declares as `configs`, else by their
  paths: CONFIGURATION/SPLIT/0000.parquet, CONFIGURATION/SPLIT-00000-of-00001.parquet, data/SPLIT-..., or as in a folder;
- images, by the rules of a folder of images, if no card, table of metadata or archive says more about them;
- the parquet files that the hub itself makes of data sets in other formats, in the revision refs/convert/parquet;
- images, with a note on what is not read; one .zip archive of images for each split.

The client's environment variables apply: `HF_ENDPOINT` for the address, `HF_HOME` for its cache, `HF_TOKEN` or a stored
login for authentication, `HF_HUB_OFFLINE` to use only files downloaded before.
"""

import fnmatch
import glob
import itertools
import json
import re
import shlex
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, cast

from stablefield._regular_file import open_regular
from stablefield.data._image_files import (
    METADATA,
    NOTED,
    SUFFIXES,
    ImageFiles,
    choose_files,
    common_folder,
    hidden,
    read_documents,
    split_word,
    stamp,
    table_note,
    zip_files,
)
from stablefield.data._tables import parquet_rows, require_pyarrow, split_of

__all__ = ["hub_files"]

CONVERTED = "refs/convert/parquet"
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".arrow")
CARD_LIMIT = 2**22
CONFIGS_LIMIT = 2**17
"""Bytes of a card, and of its `configs`, which take a hundred times as much memory while they are parsed."""
DEPTH_LIMIT = 20
"""Nesting of brackets in `configs`: the parser visits every open one for each word."""
PATTERN_LIMIT = 1000
"""Patterns of a split: each is compared with every name."""


@contextmanager
def hub_files(name: str, split: str = "train") -> Generator[ImageFiles, None, None]:
    """The image files of a data set on the hub; downloads only the files of the split.

    Args:
        name: the data set's name, "owner/name" or "owner/name:configuration".
        split: which of its splits.

    Raises:
        ValueError: if there is no such data set, it or the hub cannot be reached, it has several configurations and none is
            named, has no such split, or holds no supported images.
        ImportError: if huggingface_hub or pyarrow is not installed.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise ImportError('an hf: source needs the package huggingface_hub: pip install "stablefield[hub]"') from error
    repository, _, configuration = name.partition(":")
    if not repository:
        raise ValueError("hf: does not name a data set: write hf:OWNER/NAME, or hf:OWNER/NAME:CONFIGURATION.")
    hub = _Repository(name, repository, configuration, split)
    names = hub.listed()
    suffixes = {each: PurePosixPath(each).suffix.lower() for each in names}
    metadata = [each for each in names if PurePosixPath(each).name in METADATA]
    tables = [each for each, suffix in suffixes.items() if suffix == ".parquet" and each not in metadata]
    images = [each for each, suffix in suffixes.items() if suffix in SUFFIXES]
    archives = [each for each, suffix in suffixes.items() if suffix in ARCHIVES]
    declared, default = hub.declared() if "README.md" in names else ({}, "default")
    configurations = hub.configurations(tables, declared, default) if declared else _by_folder(tables)
    if configurations:
        yield hub.rows(configurations)
        return
    more = bool(archives or metadata or declared or configuration)
    converted = _converted(hub.listed(CONVERTED)) if more or not images else {}
    # The hub converts only the first 5 GB of a split; all the images are better than that.
    whole = images and not archives and not configuration
    if converted and not (whole and any(word.startswith("partial-") for each in converted.values() for word in each)):
        yield hub.rows(converted, CONVERTED, default)
    elif whole:
        notes = ["The configs in the data set's card are not followed for image files."] if declared else []
        documents = [each for each in names if PurePosixPath(each).name == "dataset.json"]
        yield hub.images(images, documents, [each for each in names if each not in documents], notes)
    elif archives and not images and not configuration and all(suffixes[each] == ".zip" for each in archives):
        with hub.archive(archives) as files:
            yield files
    else:
        kinds = ", ".join(sorted({suffix for suffix in suffixes.values() if suffix})[:20]) or "none"
        raise ValueError(
            f"hf:{name} holds no supported images{' by configurations' if configuration else ''}, but files of the kinds "
            f"{kinds}; supported are parquet files, image files, one .zip archive of images for each split, and data that "
            f"the hub converts to parquet. {hub.by_hand}"
        )


@dataclass(frozen=True)
class _Repository:
    """A repository on the hub, with the requested configuration and split."""

    name: str
    repository: str
    configuration: str
    split: str

    @property
    def by_hand(self) -> str:
        command = f"hf download {shlex.quote(self.repository)} --repo-type dataset --local-dir FOLDER"
        return f"Download it with `{command}`, and name the folder or a file in it."

    def listed(self, revision: str | None = None) -> list[str]:
        """The names of its files, without hidden ones; none if there is no such revision."""
        import huggingface_hub
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

        known: dict[str, Any] = {"repo_id": self.repository, "repo_type": "dataset", "revision": revision}
        try:
            try:
                names = huggingface_hub.HfApi().list_repo_files(**known)
            except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
                raise
            except Exception:
                # Offline, newer clients know the files of the repositories that they have downloaded.
                remembered = getattr(huggingface_hub, "get_cached_repo_tree", None)
                try:
                    names = [file.path for file in remembered(**known)] if remembered is not None else []
                except Exception:
                    names = []
                if not names:
                    raise
        except RevisionNotFoundError:
            return []
        except Exception as error:
            raise self._refused(error) from error
        return [name for name in sorted(names) if name[0] != "/" and not any(map(hidden, PurePosixPath(name).parts))]

    def fetched(self, patterns: Sequence[str], needed: Iterable[str], revision: str | None = None) -> Path:
        """The local folder with the files that match the patterns, including all the needed ones."""
        from huggingface_hub import snapshot_download

        try:
            folder = Path(
                snapshot_download(
                    self.repository, repo_type="dataset", revision=revision, allow_patterns=list(patterns)
                )
            )
        except Exception as error:
            raise self._refused(error) from error
        missing = next((name for name in needed if not (folder / name).exists()), None)
        if missing is not None:
            raise ValueError(f"hf:{self.name}: {missing} was not downloaded: try again. {self.by_hand}")
        return folder

    def _refused(self, error: Exception) -> ValueError:
        """The error to raise when the hub, or the client, refuses."""
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

        if isinstance(error, HFValidationError):
            return ValueError(
                f"hf:{self.name} does not name a data set: write hf:OWNER/NAME, or hf:OWNER/NAME:CONFIGURATION."
            )
        if isinstance(error, RepositoryNotFoundError):  # or one that is gated
            return ValueError(
                f"hf:{self.name}: the hub has no data set {self.repository} that you may read: check its name; for a "
                "private or gated one, request access on its page and log in with `hf auth login`."
            )
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        return ValueError(
            f"hf:{self.name}: the data set {self.repository} cannot be downloaded from the hub ({reason}): check the "
            f"connection. {self.by_hand}"
        )

    def _configured(self, configurations: Sequence[str], default: str = "default") -> str:
        """The requested configuration."""
        if self.configuration in configurations:
            return self.configuration
        if not self.configuration and (len(configurations) == 1 or default in configurations):
            return default if default in configurations else configurations[0]
        shown = ", ".join(configurations)[:1000]
        wrong = f"no configuration {self.configuration}" if self.configuration else "several configurations"
        raise ValueError(
            f"hf:{self.name}: the data set {self.repository} has {wrong}: there are {shown}; name one, such as "
            f"hf:{self.repository}:{configurations[0]}."
        )

    def _of_split(self, splits: Mapping[str, Sequence[str]]) -> str:
        return split_of(f"hf:{self.name}", list(splits), self.split)

    def rows(
        self,
        configurations: Mapping[str, Mapping[str, Sequence[str]]],
        revision: str | None = None,
        default: str = "default",
    ) -> ImageFiles:
        """The images in parquet files, given by configuration and split."""
        splits = configurations[self._configured(list(configurations), default)]
        require_pyarrow(f"hf:{self.name}, which holds parquet files,")
        partial = [word for word in splits if word.startswith("partial-")]
        splits = {word.removeprefix("partial-"): files for word, files in splits.items()}
        word = self._of_split(splits)
        folder = self.fetched([glob.escape(name) for name in splits[word]], splits[word], revision)
        files = parquet_rows(
            [folder / name for name in splits[word]],
            name=self._short,
            source=self._source(len(splits[word]), word),
            paths=False,
        )
        notes = list(files.notes)
        if f"partial-{word}" in partial:
            notes.append(
                f"These are the first images of the split {word}: the hub has converted only these to parquet."
            )
        if word and "" in splits:
            notes.append(
                f"{len(splits['']):,} parquet files belong to no split and are ignored, the first {splits[''][0][:NOTED]}."
            )
        return replace(files, notes=tuple(notes))

    def declared(self) -> tuple[dict[str, dict[str, list[str]]], str]:
        """The configurations that the card declares, and the default one.

        Each maps its splits to patterns of files; the split is "" if the card names none.
        """
        path = self.fetched(["README.md"], ["README.md"]) / "README.md"
        with open_regular(path) as file:
            text = file.read(CARD_LIMIT).decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
        head = re.match(r"---\n(.*?\n)---", text, re.S)
        # Parse only the lines of `configs`: the rest may be long.
        found = re.search(r"^configs:[^\n]*\n(?:[ \t#-][^\n]*\n|\n)*", head[1], re.M) if head else None
        if found is None:
            return {}, "default"
        import yaml

        try:
            if len(found[0]) > CONFIGS_LIMIT:
                raise ValueError(f"they have more than {CONFIGS_LIMIT:,} letters")
            depths = itertools.accumulate((c in "[{") - (c in "]}") for c in found[0])
            if max(depths) > DEPTH_LIMIT:
                raise ValueError("they are nested too deep")
            # An alias could repeat its content any number of times.
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(found[0])):
                raise ValueError("they refer to other parts of the card")
            configs: Any = yaml.safe_load(found[0])["configs"] or []
            default = next((str(each["config_name"]) for each in configs if each.get("default") is True), "default")
            return dict(map(_declared, configs)), default
        except (yaml.YAMLError, AttributeError, TypeError, KeyError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"hf:{self.name}: the configs in its README.md cannot be parsed ({reason}). {self.by_hand}"
            ) from error

    def configurations(
        self, tables: Sequence[str], declared: Mapping[str, Mapping[str, Sequence[str]]], default: str
    ) -> dict[str, dict[str, list[str]]]:
        """The parquet files that the card declares; matches only the patterns of the requested split."""
        configuration = self._configured(list(declared), default)
        splits = declared[configuration]
        word = "" if list(splits) == [""] else self._of_split(splits)
        try:
            matching = _matching(tables, splits[word])
        except ValueError as error:
            raise ValueError(f"hf:{self.name}: {error}. {self.by_hand}") from error
        found = {each: matching if each == word else [] for each in splits} if word else _by_split(matching)
        return {configuration: found} if any(found.values()) else {}

    def images(self, names: list[str], documents: list[str], others: list[str], notes: list[str]) -> ImageFiles:
        """The image files in the repository, beside its other files."""
        folder = self.fetched(list(map(glob.escape, documents)), documents) if documents else Path()
        chosen = choose_files(
            names,
            read_documents({name: folder / name for name in documents}, len(names)),
            f"hf:{self.name}",
            self.split,
        )
        place = glob.escape(common_folder(chosen.names))
        folder = self.fetched(
            [f"{place}*{suffix}" for suffix in sorted({PurePosixPath(name).suffix for name in chosen.names})],
            chosen.names,
        )

        def fingerprint() -> str:
            return json.dumps([str(folder.resolve()), [[name, *stamp(folder / name)] for name in chosen.names]])

        return ImageFiles(
            names=tuple(f"{self.repository}/{name}" for name in chosen.names),
            open=lambda i: open_regular(folder / chosen.names[i]),
            labels=chosen.labels,
            class_names=chosen.class_names,
            notes=(*chosen.notes, *table_note(others, chosen), *notes),
            name=self._short,
            source=f"Hugging Face {self.name}, {len(chosen.names):,} image files{chosen.note}",
            fingerprint=fingerprint,
        )

    @contextmanager
    def archive(self, archives: list[str]) -> Generator[ImageFiles, None, None]:
        """The images in a .zip archive, the only one or that of the split."""
        splits = _by_split(archives) if len(archives) > 1 else {"": archives}
        word = self._of_split(splits) if len(splits) > 1 else next(iter(splits))
        if len(splits[word]) > 1:
            raise ValueError(
                f"hf:{self.name} has {len(splits[word]):,} archives for one split: only one is supported. {self.by_hand}"
            )
        (name,) = splits[word]
        folder = self.fetched([glob.escape(name)], [name])
        with zip_files(folder / name, "train" if word else self.split) as files:
            yield replace(files, name=self._short, source=f"Hugging Face {self.name}, {files.source}")

    @property
    def _short(self) -> str:
        return self.repository.split("/")[-1]

    def _source(self, count: int, word: str) -> str:
        many = f"{count:,} parquet file{'s' if count != 1 else ''}"
        return f"Hugging Face {self.name}, {many}{f', split {word}' if word else ''}"


def _by_split(names: Iterable[str]) -> dict[str, list[str]]:
    """Files by the split in their names."""
    splits: dict[str, list[str]] = {}
    for name in names:
        path = PurePosixPath(name)
        numbered = re.match(r"(.+)-[0-9]{5}-of-[0-9]{5}", path.name)
        words = [numbered[1]] if numbered else map(split_word, reversed(path.parts))
        splits.setdefault(next(filter(None, words), ""), []).append(name)
    return splits


def _by_folder(names: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Files by configuration and split, from their folders."""
    configurations: dict[str, list[str]] = {}
    for name in names:
        configurations.setdefault(name.split("/")[0] if "/" in name else "", []).append(name)
    if any(top in ("", "data") or split_word(top) for top in configurations):
        configurations = {"default": list(names)}
    return {name: _by_split(files) for name, files in configurations.items()}


def _converted(names: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """The hub's own parquet files by configuration and split: CONFIGURATION/SPLIT/0000.parquet."""
    configurations: dict[str, dict[str, list[str]]] = {}
    for name in names:
        parts = name.split("/")
        if len(parts) == 3 and name.endswith(".parquet"):
            configurations.setdefault(parts[0], {}).setdefault(parts[1], []).append(name)
    return configurations


def _declared(config: Mapping[str, Any]) -> tuple[str, dict[str, list[str]]]:
    """The name of a configuration in a card, and the patterns of each of its splits."""
    place = str(config.get("data_dir") or "").removeprefix("./").strip("/")
    files: Any = config.get("data_files")
    splits: dict[str, list[str]] = {}

    def put(word: object, patterns: Any) -> None:
        if not isinstance(patterns, str | list):
            raise ValueError(f"the files of {word} are not a list")
        below = [str(pattern).removeprefix("./") for pattern in ([patterns] if isinstance(patterns, str) else patterns)]
        splits.setdefault(str(word), []).extend(f"{place}/{pattern}" if place else pattern for pattern in below)

    if not files:
        put("", "**")
    elif isinstance(files, dict):
        for word, patterns in cast("dict[Any, Any]", files).items():
            put(word, patterns)
    elif isinstance(files, list) and isinstance(files[0], dict):
        for entry in cast("list[dict[str, Any]]", files):
            put(entry["split"], entry["path"])
    else:
        put("train", files)
    return str(config.get("config_name", "default")), splits


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names that equal or match one of the patterns: `*` stays within a folder, `**` does not."""
    exact = set(patterns)
    several = [pattern for pattern in exact if re.search(r"[*?\[]", pattern)]
    if len(several) > PATTERN_LIMIT:
        raise ValueError(f"its README.md has more than {PATTERN_LIMIT:,} patterns for the files of a split")

    def matches(name: str, pattern: str) -> bool:
        deep = "**" in pattern
        if not deep and name.count("/") != pattern.count("/"):
            return False
        return fnmatch.fnmatchcase(name, pattern) or (deep and fnmatch.fnmatchcase(name, pattern.replace("**/", "")))

    return [name for name in names if name in exact or any(matches(name, pattern) for pattern in several)]
