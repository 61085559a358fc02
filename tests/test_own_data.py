"""Data of the reader's own, and the settings of the places where they run the notebook."""

import re

import helpers
import mlflow
import pytest
from helpers import cell, kernel, notebook, output

# Ten classes; columns of five types, whose names CSV, SQL and ASCII would stumble over.
OWN_DATA = """import numpy as np

random = np.random.default_rng(0)
y = pd.Series(np.repeat(np.arange(10), 15), name="Größe, 花")
X = pd.DataFrame(
    {
        'a, "quoted"': (y + random.normal(0, 0.1, len(y))).astype("float32"),
        "it's 花": y.astype("int32") % 4,
        "plain": (y * y).astype("int64"),
        "half; float64": y / 2,
        "is it?": y > 4,
    }
)
data_name = "own"
MODEL_NAME = "own_quick_start"
model_description = "One of ten classes"
plot_x, plot_y = 'a, "quoted"', "it's 花"
"""


def show_plot(plot):
    """Return code that tells of the plot: each class's label, and how many outlines differ."""
    return f"""{plot}
drawn = [c for c in ax.collections if c.get_label() != "mistake"]
print([c.get_label() for c in drawn], len({{str(c.get_paths()) for c in drawn}}))"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook on such data, with autolog on, where guesses raise errors and agg draws."""
    folder, own = tmp_path_factory.mktemp("own-data"), notebook()
    cell(own, "load-data").source = OWN_DATA
    cell(own, "import-libraries").source += "\nmlflow.autolog()"
    off = "\nmlflow.autolog(disable=True)"  # it takes seconds, and one run shows it
    cell(own, "run-lbfgs").source += off
    cell(own, "plot-mistakes").source = show_plot(cell(own, "plot-mistakes").source)
    env = {
        "MPLBACKEND": "agg",
        "MLFLOW_REQUIREMENTS_INFERENCE_RAISE_ERRORS": "true",
    }
    with kernel(folder, None, own, **env) as cells:
        cells()
        address = output(own, "connect").split()[-1]
        own.metadata.client = mlflow.MlflowClient(address)
        yield own


def test_columns_of_any_numeric_type_and_name_are_validated(executed):
    assert "150 of 150 answers are the same" in output(executed, "validate")
    assert "'champion': '" in output(executed, "promote")


def test_ten_classes_are_all_in_the_plot_each_with_a_marker_of_its_own(executed):
    labels = [str(label) for label in range(10)]
    assert output(executed, "plot-mistakes").startswith(f"{labels} 10\n")


@pytest.mark.parametrize("name", ["run-lbfgs", "run-newton-cg", "plot-mistakes"])
def test_figures_are_shown_where_mplbackend_is_exported(executed, name):
    outputs = cell(executed, name).outputs
    assert sum("image/png" in out.get("data", {}) for out in outputs) == 1


def test_autolog_adds_no_run_and_the_metrics_belong_to_the_registered_models(executed):
    client = executed.metadata.client
    runs = [(r.info.run_name, r.info.status) for r in client.search_runs(["0", "1"])]
    names = [name for name, _, _ in helpers.RUNS.values()]
    assert sorted(runs) == sorted((name, "FINISHED") for name in names)
    versions = client.search_model_versions("name='own_quick_start'")
    models = client.search_logged_models(["1"])
    measured = {m.model_uri for m in models if "accuracy" in {x.key for x in m.metrics}}
    assert len(models) == 3  # one of them is autolog's
    assert measured == {version.source for version in versions}


def test_the_guess_is_shown_where_a_failed_guess_would_raise_an_error(executed):
    assert "Fall back to return" in output(executed, "meet-warning", stderr=True)
    assert re.match(r"mlflow==.*\nscikit-learn==", output(executed, "meet-warning"))


def test_uv_gets_the_index_of_pip_unless_it_has_one_of_its_own(tmp_path):
    (settings := tmp_path / "pip.conf").write_text(
        "[global]\nextra-index-url = http://extra.invalid\nindex-url = http://file.invalid"
    )

    def told(**variables):
        cells.add(f"os.environ.update({variables})")
        cells("tell-uv", "tell-uv")
        return cells.add("print(os.environ.pop('UV_DEFAULT_INDEX', None))").strip()

    env = {"PIP_INDEX_URL": None, "UV_DEFAULT_INDEX": None}
    nothing = {"PIP_CONFIG_FILE": str(tmp_path / "none"), "PIP_EXTRA_INDEX_URL": "x"}
    with kernel(tmp_path, "http://mlflow.invalid", **env, **nothing) as cells:
        cells("start-server", "start-server")
        assert told() == "None"
        assert told(PIP_CONFIG_FILE=str(settings)) == "http://file.invalid"
        assert told(PIP_INDEX_URL="http://env.invalid") == "http://env.invalid"
        assert told(UV_DEFAULT_INDEX="http://uv.invalid") == "http://uv.invalid"
