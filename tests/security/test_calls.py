"""Two reviewed lists: what reads foreign data, and what may open a connection or start a program.

``allowed.toml`` names every place with its reason.  A new call fails here until somebody has written down why it is
safe; a call that is gone fails too, so that the lists stay what the code does.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LISTS = tomllib.loads((Path(__file__).parent / "allowed.toml").read_text(encoding="utf-8"))

LOADS = re.compile(
    r"^(eval|exec|compile|__import__|loads|safe_open|load_file|literal_eval)$"
    r"|(^|\.)(torch\.load|torch\.jit\.load|torch\.hub\.\w+|load_library|load_inline|CDLL|np\.load|numpy\.load|np\.memmap"
    r"|numpy\.memmap|np\.fromfile|json\.loads?|json_module\.loads?|tomllib\.loads?|yaml\.\w*load\w*|get_single_data"
    r"|from_pretrained|from_single_file|Tokenizer\.from_file|ParquetFile|read_table|ipc\.open_\w+|unpack_archive"
    r"|extractall|extract|import_module|spec_from_file_location|exec_module|entry_points|Unpickler|instantiate"
    r"|apply_chat_template|render_jinja_template|from_string|GGUFReader)$"
)
CONNECTS = re.compile(
    r"(^|\.)(snapshot_download|hf_hub_download|load_dataset|urlopen|urlretrieve|create_connection|requests\.\w+"
    r"|httpx\.\w+|init_process_group|init_distributed|wandb\.init|SummaryWriter|push_to_hub|upload_folder|HfApi|TCPStore"
    r"|OpenAI|HTTPServer|TCPServer|subprocess\.\w+|Popen|check_output|check_call|os\.system|os\.popen|os\.fork|os\.exec\w+"
    r"|os\.spawn\w+|multiprocessing\.\w+|socket\.(?!gethostname$)\w+)$"
)
NETWORK_MODULES = {
    "requests", "httpx", "urllib", "urllib3", "http", "ssl", "ftplib", "smtplib", "aiohttp", "websockets",
    "huggingface_hub", "datasets", "wandb", "openai", "paramiko", "xmlrpc", "socketserver", "asyncio",
}  # fmt: skip
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
UNSAFE_LITERALS = {("weights_only", False), ("allow_pickle", True), ("trust_remote_code", True), ("shell", True)}


def sources() -> list[Path]:
    return sorted([*(ROOT / "alignlab").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])


def name_of(node: ast.expr) -> str:
    """``a.b.c`` of a call's function; what stands in front of an attribute that has no name is left out."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        front = name_of(node.value)
        return f"{front}.{node.attr}"
    return ""


def calls(tree: ast.AST) -> list[str]:
    return [name for node in ast.walk(tree) if isinstance(node, ast.Call) and (name := name_of(node.func))]


def imported(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def sites(pattern: re.Pattern[str], trees: dict[str, ast.AST]) -> Counter[str]:
    """``file: call`` -> how many."""
    found: Counter[str] = Counter()
    for file, tree in trees.items():
        for name in calls(tree):
            if pattern.search(name):
                found[f"{file}: {name}"] += 1
    return found


def unsafe(file: str, tree: ast.AST) -> list[str]:
    found = [f"{file}: import {name}" for name in sorted(imported(tree) & UNSAFE_MODULES)]
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            if (node.arg, node.value.value) in UNSAFE_LITERALS:
                found.append(f"{file}: {node.arg}={node.value.value}")
        elif isinstance(node, ast.Call) and name_of(node.func).endswith("from_pretrained"):
            named = {keyword.arg for keyword in node.keywords}
            if not named & {"trust_remote_code", None}:
                found.append(f"{file}: from_pretrained without trust_remote_code")
        elif (
            isinstance(node, ast.Call)
            and name_of(node.func) in ("np.load", "numpy.load")
            and not any(keyword.arg == "allow_pickle" for keyword in node.keywords)
        ):
            found.append(f"{file}: np.load without allow_pickle=False")
    return found


TREES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in sources()
}  # fmt: skip


@pytest.mark.parametrize(("title", "pattern"), [("loads", LOADS), ("connects", CONNECTS)])
def test_every_call_stands_in_the_reviewed_list(title: str, pattern: re.Pattern[str]) -> None:
    listed = {f"{file}: {call}": why for file, entries in LISTS[title].items() for call, why in entries.items()}
    found = sites(pattern, TREES)
    assert not sorted(set(found) - set(listed)), (
        "not reviewed: add the call and its reason to tests/security/allowed.toml"
    )
    assert not sorted(set(listed) - set(found)), "listed in tests/security/allowed.toml, but the code does not do it"
    assert all(len(why.split()) >= 3 for why in listed.values())
    # Text formats may be read anywhere in a listed file; of what is riskier every call is counted.
    several = {
        site: count for site, count in found.items() if count > 1 and not site.endswith(("json.loads", "json.load"))
    }
    assert several == LISTS["several"][title]


def test_network_modules_are_imported_where_reviewed_only() -> None:
    listed = LISTS["network_imports"]
    found = {file: sorted(imported(tree) & NETWORK_MODULES) for file, tree in TREES.items()}
    assert {file: names for file, names in found.items() if names} == {
        file: sorted(names) for file, names in listed.items()
    }


def test_no_unsafe_loader_is_switched_on() -> None:
    assert [problem for file, tree in TREES.items() for problem in unsafe(file, tree)] == []


@pytest.mark.parametrize(
    "line",
    ["torch.load(x, weights_only=False)", "np.load(x, allow_pickle=True)", "np.load(x)", "import pickle",
     "from joblib import load", "A.from_pretrained(x, trust_remote_code=True)", "A.from_pretrained(x)",
     "run(x, shell=True)"],
)  # fmt: skip
def test_the_check_sees_what_is_unsafe(line: str) -> None:
    assert unsafe("x.py", ast.parse(line))


@pytest.mark.parametrize(
    ("line", "pattern"),
    [("torch.load(x)", LOADS), ("json.loads(x)", LOADS), ("yaml.safe_load(x)", LOADS), ("eval(x)", LOADS),
     ("safe_open(x)", LOADS), ("tokenizer.apply_chat_template(x)", LOADS), ("importlib.import_module(x)", LOADS),
     ("requests.get(x)", CONNECTS), ("subprocess.run(x)", CONNECTS), ("socket.socket()", CONNECTS),
     ("huggingface_hub.snapshot_download(x)", CONNECTS), ("os.system(x)", CONNECTS)],
)  # fmt: skip
def test_the_check_sees_a_new_call(line: str, pattern: re.Pattern[str]) -> None:
    assert sites(pattern, {"new.py": ast.parse(line)}) == Counter({f"new.py: {name_of_line(line)}": 1})


def name_of_line(line: str) -> str:
    return line.split("(")[0]
