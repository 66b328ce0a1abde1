"""Who may ask, from where; the addresses and keys that the server starts with; the package's own code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from fake_loop import FakeLoop
from starlette.routing import Route
from starlette.testclient import TestClient

from taper import load
from taper.cli.main import execute
from taper.errors import DoesNotFitError, UsageError
from taper.formats.container import TaperFile
from taper.server.app import make_app
from taper.server.guard import LOOPBACK_HOSTS, OPEN_PATHS
from taper.server.serving import Served
from taper.server.start import ServeOptions, check_address, listen, named, shares
from taper.testing.tiny import tiny_taper

KEY = "a-key-that-is-long-enough"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_taper(tmp_path_factory.mktemp("tiny") / "tiny.taper")


@pytest.fixture(scope="module")
def app(model):
    llm = load(model)
    return make_app({"tiny": Served("tiny", llm, FakeLoop(llm.engine))}, hosts=LOOPBACK_HOSTS, key=KEY)


@pytest.fixture(scope="module")
def client(app):
    with TestClient(app, base_url="http://localhost") as client:
        yield client


def test_every_route_but_the_open_ones_needs_the_key(app, client):
    closed = 0
    for route in app.routes:
        assert isinstance(route, Route)
        path = route.path.replace("{name}", "tiny")
        for method in route.methods - {"HEAD"}:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"}):
                status = client.request(method, path, headers=headers).status_code
                assert (status == 401) == (path not in OPEN_PATHS), path
            closed += path not in OPEN_PATHS
    assert closed >= 8
    assert client.get("/nothing").status_code == 401
    assert client.get("/v1/models", headers={"authorization": f"Bearer {KEY}"}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "", "[::2]"]
)
def test_hosts_that_are_not_this_servers(client, host):
    reply = client.get("/health", headers={"host": host})
    assert reply.status_code == 403
    assert reply.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8642", "127.0.0.1:1", "[::1]:8642"])
def test_hosts_that_are(client, host):
    assert client.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "file://"])
def test_other_origins_are_refused_and_no_cors_header_is_sent(client, origin):
    for method in ("GET", "OPTIONS"):
        reply = client.request(
            method, "/v1/models", headers={"origin": origin, "authorization": f"Bearer {KEY}"}
        )
        assert reply.status_code == 403
        assert not [name for name in reply.headers if name.startswith("access-control")]
    assert client.get("/health", headers={"origin": "http://localhost"}).status_code == 200


def test_the_page_loads_nothing_from_elsewhere(client):
    policy = client.get("/").headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in policy
    for path in ("/", "/page.js", "/page.css"):
        text = client.get(path).text
        assert len(text) > 500
        for word in ("https:", "//cdn", "innerHTML", "style=", "onclick"):
            assert word not in text
        assert text.count("http:") == text.count("http://www.w3.org/2000/svg")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_no_address_for_others_without_a_key(host, taper_error):
    with pytest.raises(UsageError, match="no API key"):
        check_address(ServeOptions(host))
    check_address(ServeOptions(host, key=KEY))
    assert "no API key" in taper_error("serve", "--host", host)


def test_loopback_needs_no_key():
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        check_address(ServeOptions(host))


def test_short_keys_and_empty_key_files(tmp_path, taper_error, monkeypatch):
    with pytest.raises(UsageError, match="5 characters"):
        check_address(ServeOptions(key="short"))
    empty = tmp_path / "key"
    empty.write_text("\n")
    assert "is empty" in taper_error("serve", "--api-key-file", empty)
    monkeypatch.setenv("TAPER_API_KEY", "tiny")
    assert "4 characters" in taper_error("serve")


@pytest.fixture
def taper_error(capsys, monkeypatch):
    monkeypatch.delenv("TAPER_DEBUG", raising=False)

    def run(*arguments):
        assert execute([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err

    return run


def test_a_port_that_is_taken(taper_error):
    with listen(ServeOptions(port=0)) as bound:
        bound.listen()
        assert "cannot listen" in taper_error("serve", "--port", bound.getsockname()[1])


def test_without_the_extra_the_command_says_what_to_install(taper_error, monkeypatch):
    monkeypatch.setattr("taper.cli.serve.find_spec", lambda name: None)
    assert "pip install 'taper[server]'" in taper_error("serve")


def test_names_of_models():
    assert named(["a/b.taper", "x=c.taper", "folder"]) == {
        "b": Path("a/b.taper"),
        "x": Path("c.taper"),
        "folder": Path("folder"),
    }
    for wrong in (["a.taper", "b/a.taper"], ["=x"], ["a b=x"]):
        with pytest.raises(UsageError):
            named(wrong)


def test_several_models_share_the_memory(model, tmp_path):
    small = tiny_taper(tmp_path / "small.taper", max_bits=4)
    files = {"tiny": model, "small": small}
    least = {name: TaperFile.open(path).memory_at(2) for name, path in files.items()}
    parts = shares(files, sum(least.values()) + 1000)
    assert sum(least.values()) < sum(parts.values()) <= sum(least.values()) + 1000
    assert all(parts[name] >= least[name] for name in files)
    assert parts["tiny"] - least["tiny"] > parts["small"] - least["small"]
    with pytest.raises(DoesNotFitError, match="at least widths"):
        shares(files, sum(least.values()) - 1)


# --- the package itself -----------------------------------------------------------------------------------

PACKAGE = Path(__file__).parents[2] / "src" / "taper"


def dangers(source: str) -> list[str]:
    """Ways in which a file could run text or bytes that it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [
                n for n in names if n.split(".")[0] in {"pickle", "dill", "marshal", "shelve", "cloudpickle"}
            ]
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            of_module = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "")
            if (isinstance(node.func, ast.Name) and name in {"eval", "exec", "compile", "__import__"}) or (
                of_module == "os" and name in {"system", "popen"}
            ):
                found.append(name)
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                if (keyword.arg == "shell" and value is not False) or (
                    keyword.arg == "allow_pickle" and value
                ):
                    found.append(keyword.arg)
            is_torch_load = of_module == "torch" and name == "load"
            if is_torch_load and not any(keyword.arg == "weights_only" for keyword in node.keywords):
                found.append("torch.load")
    return found


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_nothing_in_the_package_runs_what_it_reads(path):
    assert not dangers(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "exec(text)",
        "subprocess.run(x, shell=True)",
        "os.system(x)",
        "np.load(x, allow_pickle=True)",
        "torch.load(x)",
        "compile(x, '', 'exec')",
    ],
)
def test_the_check_finds_each_of_them(source):
    assert dangers(source)
