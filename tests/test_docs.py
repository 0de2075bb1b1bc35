"""The documentation: blocks of code run or are checked, links lead to files, names are documented.

A block of a page is `python` (it runs), `sh` (every command is checked) or `text` (an output). A
comment before a block changes that:

    <!-- run small -->        the commands run as well, with a small model and a short text
    <!-- rejected -->         the command ends with the message in the `text` block that follows
    <!-- not run: reason -->  neither run nor checked
    <!-- run: name -->        run by .ci/run, word for word (README)

The blocks of a page share a folder, and in Python variables. One with a title is a file.
"""

import ast
import importlib
import inspect
import json
import os
import pathlib
import re
import runpy
import shlex
import traceback
from typing import NamedTuple

import pytest
from reliability import FORKS, Command, prepare_fork
from test_imports import MODULES
from tiny_runs import write_text
from xla_flags import FAST_COMPILATION, make_xla_flags

from jaxgpt.config import Config, ConfigError, load, override
from jaxgpt.interop.formats import FORMATS
from jaxgpt.planning.chips import parse_device, parse_topology

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAX_NOT_RUN = 3
LANGUAGES = ("python", "sh", "text")
FENCE = re.compile(
    r'(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w*)(?: title="(?P<title>[^"\n]+)")?\n'
    r"(?P<text>.*?)^```$",
    re.M | re.S,
)
SMALL = [
    *("model.vocab=512", "model.context=32", "model.width=32", "model.layers=2"),
    *("model.heads=2", "model.ffn=48", "train.steps=2", "train.batch=8", "train.accumulate=1"),
    *("train.eval_every=2", "train.eval_batches=1", "train.save_every=2", "train.sample_every=0"),
    *("train.log_every=1", "optimizer.warmup=1", "sample.tokens=4", "data.workers=1"),
    "model.unroll=1",
]
ENVIRONMENT = {"XLA_FLAGS": make_xla_flags(1)}  # of what the pages run


class Block(NamedTuple):
    """A block of code of a page."""

    page: str
    line: int  # of its fence
    language: str
    mark: str  # the comment before it
    title: str
    text: str


def name_page(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT))


def read_blocks(page: pathlib.Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(
            name_page(page),
            text.count("\n", 0, match.end("language")) + 1,
            match["language"],
            match["mark"] or "",
            match["title"] or "",
            match["text"],
        )
        for match in FENCE.finditer(text)
    ]


BLOCKS = {name_page(page): read_blocks(page) for page in PAGES}


def split_commands(text: str) -> list[list[str]]:
    """Split a block of shell into commands, each a list of words."""
    commands: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            commands.append(words[:end])
            words = words[end + 1 :]
    return commands


def split_environment(words: list[str]) -> tuple[list[str], list[str]]:
    """Split a command into its variables, NAME=value, and the rest."""
    count = next(n for n, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
    return words[:count], words[count:]


def split_script(words: list[str]) -> tuple[str, list[str]]:
    """Return ("train" or "sample", arguments) of a command of a script, else ("", words)."""
    program = pathlib.PurePath(words[0]).name
    if program == "python" and words[1] in ("train.py", "sample.py"):
        return words[1].removesuffix(".py"), words[2:]
    if program == "jaxgpt":
        return words[1], words[2:]
    return ("", words)


def parse_arguments(script: str, words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return the flags, which the script must have, and the other arguments."""
    source = read(f"jaxgpt/cli/{script}.py") + read("jaxgpt/cli/__init__.py")
    flags, rest, words = {}, [], list(words)
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            assert f'"{word}"' in source, f"jaxgpt {script} has no flag {word}"
            is_switch = re.search(rf'"{word}",\s+action="store_true"', source)
            flags[word] = "" if is_switch else words.pop(0)
        else:
            rest.append(word)
    return flags, rest


def check_train(arguments: list[str]) -> Config:
    flags, settings = parse_arguments("train", arguments)
    config = flags.get("--config", "stdlib")
    if config.startswith("examples/"):  # reads a model that may not be there
        assert (ROOT / config).is_file()
        return override(Config(), settings)
    return load(config, settings)


def check_sample(arguments: list[str]) -> Config:
    _, (run, *settings) = parse_arguments("sample", arguments)
    assert run.startswith("runs/")
    settings = [x if x.startswith("plugins=") else f"sample.{x}" for x in settings]
    return override(Config(), settings)


def check_evaluate(arguments: list[str]) -> Config:
    _, rest = parse_arguments("evaluate", arguments)
    settings = [word for word in rest if "=" in word]
    runs = [word for word in rest if "=" not in word]
    assert runs
    assert all(run.startswith("runs/") or run.endswith(".gguf") for run in runs)
    return override(Config(), settings)


def check_import(arguments: list[str]):
    _, (path, run) = parse_arguments("import_", arguments)
    assert run.startswith("runs/")
    assert path


def check_export(arguments: list[str]):
    flags, (run, path) = parse_arguments("export", arguments)
    assert run.startswith("runs/") or run.endswith(".gguf")
    assert path
    assert FORMATS[flags.get("--format", "hf")].write


def check_inspect(arguments: list[str]):
    _, (path,) = parse_arguments("inspect", arguments)
    assert path


def check_plan(arguments: list[str]) -> Config:
    flags, settings = parse_arguments("plan", arguments)
    if topology := flags.get("--topology"):
        parse_topology(topology)
    if device := flags.get("--fit", "").replace("here", ""):
        parse_device(device)
    return load(flags.get("--config", "stdlib"), settings)


CHECKS = {
    "train": check_train, "sample": check_sample, "evaluate": check_evaluate, "plan": check_plan,
    "import": check_import, "export": check_export, "inspect": check_inspect,
}  # fmt: skip


def check_flags(command: str, arguments: list[str]):
    """Check a subcommand without settings of a run: it is there and has the flags."""
    source = read(f"jaxgpt/cli/{command}.py") + read("jaxgpt/cli/__init__.py")
    for word in arguments:
        assert not word.startswith("--") or f'"{word}"' in source, f"{command} has no flag {word}"


def check_module(name: str, arguments: list[str]):
    """Check a module that is run: it is there and has the flags."""
    if not name.startswith(("benchmarks.", "examples.")):
        importlib.import_module(name)
        return
    source = (ROOT / f"{name.replace('.', '/')}.py").read_text()
    for word in arguments:
        assert not word.startswith("--") or f'"{word}"' in source, f"{name} has no flag {word}"


def check_pip(arguments: list[str]):
    """Check an installation: the extras of jaxgpt and the files are there."""
    assert arguments[0] == "install"
    extras = re.search(r"optional-dependencies\]\n(.*?)\n\[", read("pyproject.toml"), re.S)
    known = re.findall(r"^([a-z]+) = \[", extras[1], re.M)
    for word in arguments:
        if match := re.fullmatch(r"\.\[(.*)\]", word):
            assert set(match[1].split(",")) <= set(known)
        if word.endswith(".txt"):
            assert (ROOT / word).is_file()


CLUSTER_PROGRAMS = ("docker", "export", "kubectl", "sbatch", "scancel", "sky", "squeue")


def check_cluster_command(words: list[str]):
    """Check a command of a page on clusters: its files are there, the arguments of a run valid."""
    files = [word for word in words if word.startswith("deploy/")]
    assert all((ROOT / file).is_file() for file in files), f"no such file in {words}"
    if words[0].startswith("deploy/tpu/") and words[1] in ("start", "keep"):
        check_train(words[2:])
    elif "--" in words or words[0] == "sbatch":
        last = "--" if "--" in words else "deploy/slurm/train.sbatch"
        check_train(words[words.index(last) + 1 :])


def check_curl(words: list[str]):
    """Check a request to a server: there is the route, and it has the fields."""
    from jaxgpt.serve import fields, http, schema

    routes = {"chat/completions": schema.CHAT, "completions": schema.COMPLETION,
              "embeddings": schema.EMBEDDING, "look": schema.LOOK}  # fmt: skip
    (url,) = [word for word in words if word.startswith("http://")]
    path = "/" + url.split("/", 3)[3]
    assert path in http.PATHS
    if "-d" in words:
        route = routes[path.removeprefix("/v1").removeprefix("/")]
        assert fields.read_object(route, json.loads(words[words.index("-d") + 1]))


def check_command(words: list[str]):
    """Check one command of a page without running it."""
    words = split_environment(words)[1]
    script, arguments = split_script(words)
    program = words[0] if words[0] == "." else pathlib.PurePath(words[0]).name
    if script:
        check = CHECKS.get(script)
        check(arguments) if check else check_flags(script, arguments)
    elif program in ("python", "python3") and words[1] == "-m":
        check_module(words[2], words[3:])
    elif program == "pip":
        check_pip(words[1:])
    elif program == "curl":
        check_curl(words)
    elif program == "bash":
        assert (ROOT / words[1]).is_file()
    elif program in CLUSTER_PROGRAMS or words[0].startswith("deploy/"):
        check_cluster_command(words)
    else:
        assert program in ("mkdocs", "tensorboard", "."), f"unknown command {words}"


def read(path: str) -> str:
    return (ROOT / path).read_text()


def make_page_folder(folder: pathlib.Path, page: str):
    """Make what the pages name: the checkout's scripts and configs, and texts."""
    for name in ("train.py", "sample.py", "configs", "jaxgpt"):
        (folder / name).symlink_to(ROOT / name)
    write_text(folder / "my_texts")
    (folder / "prompts.txt").write_text("the cat\na dog\n")
    records = [{"question": f"the cat {n}", "answer": f"a dog {n}"} for n in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))
    (folder / "rt_polarity").mkdir()
    for kind, word in (("pos", "good"), ("neg", "bad")):
        lines = "".join(f"a {word} film of number {n} .\n" for n in range(40))
        (folder / "rt_polarity" / f"x.{kind}").write_text(lines)
    for block in BLOCKS[page]:
        if block.title:
            (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.title).write_text(block.text)


def make_small(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return a command of the scripts with small settings: variables, arguments of `jaxgpt`."""
    variables, words = split_environment(words)
    script, arguments = split_script(words)
    assert script, f"cannot run {words}"
    if script == "train":
        text = [] if any("data.source" in x for x in arguments) else ["data.source=my_texts/"]
        arguments = [*arguments, *SMALL, *text]
    return dict(variable.split("=", 1) for variable in variables), [script, *arguments]


def list_items(page: str) -> list[tuple]:
    """List what runs of a page: (page, line, Python text or command)."""
    items: list[tuple] = []
    for block in BLOCKS[page]:
        if block.language == "python" and not block.title and not block.mark.startswith("not run"):
            items.append((page, block.line, block.text))
        if block.language == "sh" and block.mark == "run small":
            commands = [make_small(words) for words in split_commands(block.text)]
            items += [(page, block.line, command) for command in commands]
    return items


def run_items(folder: pathlib.Path, items: list[tuple], compiled: pathlib.Path):
    """Run what a page has, in order: its Python in one process, each command in one of its own."""
    python = None
    for page, line, item in items:
        if isinstance(item, str):
            python = python or PythonProcess(folder, compiled)
            python.run(page, line, item)
        else:
            variables, arguments = item
            if flags := variables.get("XLA_FLAGS"):
                variables = variables | {"XLA_FLAGS": f"{flags} {FAST_COMPILATION}"}
            command = Command(arguments, ENVIRONMENT | variables, str(compiled), str(folder))
            out = command.stdout.read()
            assert command.wait() == 0, f"{page}:{line}: {out[-4000:]}"
    if python:
        python.end()


class PythonProcess:
    """A process for the Python of a page, whose blocks share their variables."""

    def __init__(self, folder: pathlib.Path, compiled: pathlib.Path):
        self._output = folder / "output.txt"
        self._pipe, pipe = FORKS.Pipe()
        arguments = (pipe, str(self._output), str(compiled), str(folder))
        self._process = FORKS.Process(target=run_blocks, args=arguments, daemon=True)
        self._process.start()
        pipe.close()

    def run(self, page: str, line: int, text: str):
        """Run a block."""
        self._pipe.send((page, line, text))
        error = self._pipe.recv()
        assert not error, f"{self._output.read_text()[-2000:]}\n{error[-4000:]}"

    def end(self):
        """End the process."""
        self._pipe.send(None)
        self._process.join()


def run_blocks(pipe, output: str, compiled: str, folder: str):
    """Run the blocks that a pipe delivers, and send the traceback of each, or nothing."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    for number in (1, 2):
        os.dup2(file, number)
    prepare_fork(ENVIRONMENT, compiled, folder)
    namespace = {"__name__": "__main__"}
    while block := pipe.recv():
        page, line, text = block
        try:
            exec(compile("\n" * line + text, page, "exec"), namespace)
            pipe.send("")
        except BaseException:
            pipe.send(traceback.format_exc())


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Return a folder with compiled programs, and the runs `stdlib` and `mine`."""
    folder = tmp_path_factory.mktemp("docs")
    make_page_folder(folder, "README.md")
    commands = ["python train.py", "python train.py name=mine"]
    items = [("", 0, make_small(shlex.split(command))) for command in commands]
    run_items(folder, items, folder / "compiled")
    return folder


# --- blocks ---


@pytest.mark.parametrize("page", BLOCKS)
def test_every_block_has_a_language(page):
    assert len(BLOCKS[page]) == len(re.findall(r"^```", read(page), re.M)) / 2
    assert {block.language for block in BLOCKS[page]} <= set(LANGUAGES)


def test_few_blocks_are_neither_run_nor_checked():
    marks = [block.mark for blocks in BLOCKS.values() for block in blocks]
    exceptions = [mark for mark in marks if mark.startswith("not run")]
    assert all(re.fullmatch(r"not run: .{10,}", mark) for mark in exceptions)
    assert len(exceptions) <= MAX_NOT_RUN


@pytest.mark.parametrize("page", BLOCKS)
def test_commands_are_valid(page, tmp_path, monkeypatch):
    make_page_folder(tmp_path, page)
    monkeypatch.chdir(tmp_path)
    for block, following in zip(BLOCKS[page], [*BLOCKS[page], None][1:], strict=True):
        if block.language != "sh" or block.mark.startswith("not run"):
            continue
        commands = split_commands(block.text)
        if block.mark == "rejected":
            with pytest.raises(ConfigError) as caught:
                check_command(commands[0])
            assert following.text == f"train.py: {caught.value}\n"
        else:
            for words in commands:
                check_command(words)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in BLOCKS if list_items(page)])
def test_blocks_run(page, tmp_path, cache):
    make_page_folder(tmp_path, page)
    (tmp_path / "runs").mkdir()
    for name in ("stdlib", "mine"):
        made_by_page = any(f"name={name}" in str(item) for *_, item in list_items(page))
        if not made_by_page:
            (tmp_path / "runs" / name).symlink_to(cache / "runs" / name)
    run_items(tmp_path, list_items(page), cache / "compiled")


# --- pages ---


@pytest.mark.parametrize("page", BLOCKS)
def test_links_between_pages_lead_to_files(page):
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", read(page))
    folder = (ROOT / page).parent
    assert not [link for link in links if not (folder / link).exists()]


def test_readme_is_short():
    assert len(read("README.md").splitlines()) <= 130


def test_the_reading_path_has_about_1500_lines():
    hooks = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    rows = hooks["read_reading_path"](read("docs/reading.md"))
    assert len(rows) == read("docs/reading.md").count("\n| `")
    assert 1300 <= sum(count for _, _, count in rows) <= 1700


def test_every_module_is_in_the_reference_once():
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    assert sorted(re.findall(r"^::: (\S+)$", pages, re.M)) == sorted(
        MODULES.keys() - {"jaxgpt.__main__"}
    )


# --- docstrings ---


def find_undocumented(module: str) -> list[str]:
    """Return the public names of a module without a docstring; a method may inherit its own."""

    def is_documented(docstring: str | None) -> bool:
        return len((docstring or "").split()) >= 3

    tree = ast.parse(MODULES[module].read_text())
    missing = [] if is_documented(ast.get_docstring(tree)) else [module]
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if not is_documented(ast.get_docstring(node)):
            missing.append(f"{module}.{node.name}")
        if isinstance(node, ast.ClassDef):
            kind = getattr(importlib.import_module(module), node.name)
            methods = [n.name for n in node.body if isinstance(n, ast.FunctionDef)]
            missing += [
                f"{module}.{node.name}.{name}"
                for name in methods
                if not name.startswith("_")
                and not is_documented(inspect.getdoc(getattr(kind, name)))
            ]
    return missing


@pytest.mark.parametrize("module", MODULES)
def test_public_names_have_docstrings(module):
    assert not find_undocumented(module)
