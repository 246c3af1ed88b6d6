"""The text the embedded model is trained on: what the running Python itself ships with, as documents and as
conversations.

Help topics come from `pydoc_data`, docstrings from the standard library's sources (parsed, never executed),
and those of modules written in C from the modules. Order, de-duplication and the held-out slice are
deterministic."""

import ast
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import pydoc
import random
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idlelib",
    "turtledemo",
    "site-packages",
    "pydoc_data",
    "__pycache__",
    "idle_test",
}
HELD_OUT_ONE_IN = 50
MIN_CHARS = 24
MAX_ANSWER_CHARS = 420
_PLAIN_PUNCTUATION = str.maketrans(
    {
        "\u201c": '"',
        "\u201d": '"',
        "\u2018": "'",
        "\u2019": "'",
        "\u2026": "...",
        "\u2014": "-",
        "\u2013": "-",
    }
)


@dataclass(frozen=True)
class CorpusEntry:
    kind: str  # topic, module, class, function or method
    name: str  # the name a person would ask for: "shutil.copytree", "with"
    heading: str  # the line before the text, a signature mostly; "" for topics, which bring their own
    text: str
    group: str  # documents of one group belong together and stay in order

    @property
    def is_public(self) -> bool:
        return not any(part.startswith("_") for part in self.name.split("."))

    @property
    def short_name(self) -> str:
        """The name without the module: "copytree", "Path.exists"."""
        return ".".join(self.name.split(".")[-2 if self.kind == "method" else -1 :])

    @property
    def is_held_out(self) -> bool:
        return int.from_bytes(hashlib.sha256(self.text.encode()).digest()[:4], "big") % HELD_OUT_ONE_IN == 0

    def render(self, with_heading: bool = True) -> str:
        return f"{self.heading}\n\n{self.text}" if self.heading and with_heading else self.text


def collect_documents() -> list[CorpusEntry]:
    """Every document, each text once (numbers aside), in the order of topics, C modules, source files."""
    unique: dict[str, CorpusEntry] = {}
    for document in (*_topics(), *_compiled_documents(), *_source_documents()):
        if len(document.text) >= MIN_CHARS and document.text.isascii():
            unique.setdefault(re.sub(r"[\W\d]+", " ", document.text).strip().lower(), document)
    return list(unique.values())


def _topics() -> Iterator[CorpusEntry]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        text = topics[name].translate(_PLAIN_PUNCTUATION)
        yield CorpusEntry(
            "topic", name, "", text.encode("ascii", "replace").decode().strip(), f"topic {name}"
        )


def _source_documents() -> Iterator[CorpusEntry]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.isdisjoint(parts):
            yield from _file_documents(path, ".".join(part for part in parts if part != "__init__"))


def _file_documents(path: Path, module: str) -> Iterator[CorpusEntry]:
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(path.read_bytes())
    except SyntaxError:  # samples of other Pythons' syntax lie among the sources
        return
    if text := ast.get_docstring(tree):
        yield CorpusEntry("module", module, f"module {module}", text.strip(), module)
    yield from _definitions(tree, module, module, in_class=False)


def _definitions(tree: ast.AST, prefix: str, module: str, in_class: bool) -> Iterator[CorpusEntry]:
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if isinstance(node, ast.stmt):  # definitions under `if` and `try`
                yield from _definitions(node, prefix, module, in_class)
            continue
        is_class = isinstance(node, ast.ClassDef)
        name = f"{prefix}.{node.name}"
        if text := ast.get_docstring(node):
            kind = "class" if is_class else "method" if in_class else "function"
            arguments = ", ".join(map(ast.unparse, node.bases)) if is_class else ast.unparse(node.args)
            heading = f"class {name}({arguments})" if is_class else f"{name}({arguments})"
            yield CorpusEntry(kind, name, heading, text.strip(), module)
        yield from _definitions(node, name, module, is_class)


def _compiled_documents() -> Iterator[CorpusEntry]:
    for module_name in sorted(sys.stdlib_module_names):
        if module_name.startswith(("_test", "_xx", "xx", "_tkinter")):
            continue
        if (module := _compiled_module(module_name)) is not None:
            yield from _module_documents(module, "os" if module_name == "posix" else module_name.lstrip("_"))


def _compiled_module(name: str) -> ModuleType | None:
    if name not in sys.builtin_module_names:
        spec = importlib.util.find_spec(name)
        if spec is None or not isinstance(spec.loader, importlib.machinery.ExtensionFileLoader):
            return None
    with warnings.catch_warnings(action="ignore"):  # some are deprecated
        return importlib.import_module(name)


def _module_documents(module: ModuleType, name: str) -> Iterator[CorpusEntry]:
    if module.__doc__ and name != "builtins":
        yield CorpusEntry("module", name, f"module {name}", inspect.cleandoc(module.__doc__), name)
    for key, value in sorted(vars(module).items()):
        public = key if name == "builtins" else f"{name}.{key}"
        if inspect.isclass(value) and value.__name__ == key:
            yield from _object_document("class", public, value, name)
            for method, function in sorted(vars(value).items()):
                if callable(function):
                    yield from _object_document("method", f"{public}.{method}", function, name)
        elif inspect.isbuiltin(value):
            yield from _object_document("function", public, value, name)


def _object_document(kind: str, name: str, value: object, group: str) -> Iterator[CorpusEntry]:
    text = getattr(value, "__doc__", None)
    if isinstance(text, str):
        signature = re.sub(r"\$\w+(, )?|, /|/, ", "", getattr(value, "__text_signature__", None) or "")
        heading = f"class {name}{signature}" if kind == "class" else f"{name}{signature or '(...)'}"
        yield CorpusEntry(kind, name, heading, inspect.cleandoc(text).strip(), group)


# Conversations: questions a person would ask about a document, answered with its opening.

_QUESTIONS = {
    "topic": (
        "What is {}?",
        "Explain {}.",
        "Tell me about {}.",
        "What does Python's documentation say about {}?",
    ),
    "module": (
        "What is the {} module?",
        "What is {} for?",
        "What does the {} module do?",
        "What is {}?",
        "Tell me about {}.",
    ),
    "class": (
        "What is {}?",
        "What does the class {} do?",
        "What is the {} class?",
        "Explain {}.",
        "What does {} do?",
    ),
    "function": (
        "What does {} do?",
        "What does the function {} do?",
        "What is {}?",
        "Explain {}.",
        "What does {}() do?",
    ),
    "method": ("What does {} do?", "What does the method {} do?", "Explain {}.", "What does {}() do?"),
}
_ABOUT = (
    "I am a small language model, trained on the documentation that ships with Python. "
    "Ask me about a module, a function or a statement."
)
_GREETINGS = (
    "Hello",
    "Hello!",
    "Hi",
    "Hi there!",
    "Hello, who are you?",
    "Who are you?",
    "What can you do?",
    "Help",
)
_SYSTEM_PROMPTS = ("You are a helpful assistant.", "You answer questions about Python.", "Be concise.")


def opening(text: str) -> str | None:
    """The first sentences of a document, unwrapped to one paragraph; None where it does not open with
    prose."""
    taken = ""
    for paragraph in re.split(r"\n\s*\n", text):
        line = re.sub(r"^[^\n]*\n[*=\-~^]{3,}(\n|$)", "", paragraph.strip("\n"))
        if _is_prose(line):
            unwrapped = " ".join(line.split())
            if taken and len(taken) + len(unwrapped) > MAX_ANSWER_CHARS:
                break
            taken = f"{taken} {unwrapped}".strip()
            taken = taken if taken[-1] in ".!?:" else taken + "."
        elif taken:
            break
    if len(taken) > MAX_ANSWER_CHARS:
        taken = re.sub(r"([.!?])\s[^.!?]*$", r"\1", taken[:MAX_ANSWER_CHARS] + " ")
    taken = re.sub(r"(\.) [^.]*:$", r"\1", taken)  # "The attributes are:" promises a list that is not there
    return taken if len(taken) >= MIN_CHARS and taken[-1] in ".!?" else None


def _is_prose(paragraph: str) -> bool:
    starts_like_code = re.match(r"\s|>>>|[-*+@]|[\w.]+\([^)]*\)( ->|$|\n)|[\w.]+ ::?=", paragraph) is not None
    return len(paragraph.split()) >= 4 and not starts_like_code and "::=" not in paragraph


def questions_and_answers(documents: list[CorpusEntry]) -> list[tuple[tuple[str, ...], str, float]]:
    """For each public document: every phrasing of its question, the answer, and how often to ask it in an
    epoch."""
    num_of_name = Counter(document.short_name for document in documents)
    pairs: list[tuple[tuple[str, ...], str, float]] = [(_GREETINGS, _ABOUT, 30)]
    for document in documents:
        if document.is_public and (answer := opening(document.text)) is not None:
            names = _subject_names(document, num_of_name[document.short_name] == 1)
            phrasings = tuple(
                phrasing.format(name) for name in names for phrasing in _QUESTIONS[document.kind]
            )
            pairs.append((phrasings, answer, _times_asked(document)))
    return pairs


def _times_asked(document: CorpusEntry) -> float:
    """A small model remembers what it sees often: the language itself and what people meet first."""
    depth = document.name.count(".")
    if document.group == "builtins":
        return 4 if depth else 10
    if document.kind in ("topic", "module"):
        return 16 if document.kind == "topic" else 2 if depth else 5
    return 0.3 if depth > 1 else 2


def _subject_names(document: CorpusEntry, is_short_unique: bool) -> tuple[str, ...]:
    """The names that people use for a document's subject, the full name first."""
    if document.kind != "topic":
        return (document.name, document.short_name) if is_short_unique else (document.name,)
    title = document.text.splitlines()[0].replace('"', "").lower()
    topics = {**pydoc.Helper.topics, **pydoc.Helper.keywords}
    targets = {
        word.lower(): target if isinstance(target, str) else target[0] for word, target in topics.items()
    }
    return tuple(
        dict.fromkeys([title, *(word for word, target in targets.items() if target == document.name)])
    )


def conversation(rng: random.Random, turns: list[tuple[tuple[str, ...], str]]) -> list[dict[str, str]]:
    """Messages that ask each turn's question in one of its phrasings, sometimes under a system prompt."""
    messages = [{"role": "system", "content": rng.choice(_SYSTEM_PROMPTS)}] if rng.random() < 0.1 else []
    for phrasings, answer in turns:
        question = rng.choice(phrasings)
        question = question.rstrip(".?") if rng.random() < 0.15 else question
        question = question[:1].lower() + question[1:] if rng.random() < 0.15 else question
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages
