"""The models come from the registry, and one that fails in its own environment is not promoted."""

import mlflow
import pytest
from helpers import NAME, kernel, loopback, output, quoted, refusal


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """The notebook, executed up to uv's index on a server of its own; nothing is promoted."""
    folder = tmp_path_factory.mktemp("notebook")
    with kernel(folder, None) as cells:
        cells("start-server", "tell-uv")
        # a module of this name must not reach the fresh environment
        (folder / "mlflow.py").touch()
        address = output(cells.notebook, "connect").split()[-1]
        cells.client = mlflow.MlflowClient(address)
        ids = [
            cells.client.get_model_version(NAME, n).source.split("/")[-1] for n in "12"
        ]
        cells.models = [next(folder.rglob(model_id)) / "artifacts" for model_id in ids]
        yield cells


def refused(cells):
    """Validate what must not pass; return all that the page shows. Nothing may be promoted."""
    shown = refusal(cells, "validate")
    with pytest.raises(mlflow.MlflowException, match="alias champion not found"):
        cells.client.get_model_version_by_alias(NAME, "champion")
    assert cells.client.get_model_version(NAME, "2").tags == {}
    return shown


def test_the_models_that_predict_come_from_the_registry(cells):
    cells.client.rename_registered_model(NAME, "elsewhere")
    shown = refusal(cells, "reload-models")
    cells.client.rename_registered_model("elsewhere", NAME)
    assert f"Registered Model with name={NAME} not found" in shown
    cells("reload-models", "reload-models")


def test_the_model_that_answers_in_the_end_is_the_one_with_the_alias(cells):
    assert "alias champion not found" in refusal(cells, "use-champion")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        # it cannot be built
        ("requirements.txt", b"mlflow==0.0.2\nmlflow==0.0.1", "mlflow==0.0.1"),
        # nothing but the list is in it
        ("requirements.txt", b"packaging", "No module named 'mlflow'"),
        # it gives no answer
        pytest.param(
            *("model.skops", b"nothing", "CalledProcessError: Command"),
            marks=pytest.mark.slow,
        ),
        # it gives the answers of version 1
        ("model.skops", None, "AssertionError: The answers differ"),
    ],
)
def test_a_version_is_not_promoted_if_its_own_environment_fails(
    cells, file, content, words
):
    path = cells.models[1] / file
    before = path.read_bytes()
    path.write_bytes(content or (cells.models[0] / file).read_bytes())
    shown = refused(cells)
    path.write_bytes(before)
    assert words in shown


def test_without_a_network_uv_says_so_and_nothing_is_promoted(cells, tmp_path):
    cells.add(f"os.environ.update(UV_OFFLINE='1', UV_CACHE_DIR={str(tmp_path)!r})")
    shown = refused(cells)
    cells.add("del os.environ['UV_OFFLINE'], os.environ['UV_CACHE_DIR']")
    assert "network was disabled" in shown


def test_uv_asks_the_index_that_pip_is_told_of(cells, tmp_path):
    index = f"{loopback()}/simple"  # nobody listens there
    told = {
        "PIP_INDEX_URL": index,
        "UV_CACHE_DIR": f"{tmp_path}",
        "UV_HTTP_RETRIES": "0",
    }
    cells.add(f"os.environ.update({told})")
    cells("tell-uv", "tell-uv")
    shown = refused(cells)
    cells.add(f"for name in {[*told, 'UV_DEFAULT_INDEX']}: del os.environ[name]")
    assert f"{quoted('fetch')[0]}: {index}" in shown


def test_with_everything_in_place_the_version_is_promoted(cells):
    cells("validate", "use-champion")
    assert cells.client.get_model_version_by_alias(NAME, "champion").version == "2"
    assert cells.client.get_model_version(NAME, "2").tags == {"validation": "passed"}
    cells.client.delete_registered_model_alias(NAME, "champion")
    cells.client.delete_model_version_tag(NAME, "2", "validation")
