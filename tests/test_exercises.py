"""The exercises under Your turn, each with what it promises."""

import re
from types import SimpleNamespace

import mlflow
import pytest
from helpers import (
    NAME,
    RUNS,
    cell,
    execute,
    kernel,
    mlflow_server,
    notebook,
    output,
    passed,
)
from maintain import frame


def exercises():
    """Return each exercise: its code, and the text around it, which says what comes out."""
    parts = re.split(
        r"^\d\. ", cell(notebook(), "your-turn").source, flags=re.MULTILINE
    )[1:]
    code = [re.search(r"```python\n(.*?)```", part, re.DOTALL)[1] for part in parts]
    code = [re.sub(r"^   ", "", block, flags=re.MULTILINE) for block in code]
    return [SimpleNamespace(code=c, text=p) for c, p in zip(code, parts, strict=True)]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The first four exercises after the notebook, in their order: what each cell has shown."""
    folder = tmp_path_factory.mktemp("exercises")
    with (
        mlflow_server(folder) as address,
        kernel(folder / "notebook", address) as cells,
    ):
        cells()
        shown = [cells.add(exercise.code) for exercise in exercises()[:4]]
        yield SimpleNamespace(shown=shown, client=mlflow.MlflowClient(address))


def test_the_first_exercise_changes_c_alone():
    name, params, _ = passed(exercises()[0].code)
    (_, first, _), (_, second, _) = RUNS.values()
    assert params == first | {"C": second["C"]}, "your-turn, exercise 1"
    assert name == f"{params['solver']}, C={params['C']:g}", "your-turn, exercise 1"


@pytest.mark.parametrize("number", [1, 2])
def test_the_figures_of_the_first_exercises_are_those_of_the_second_run(number):
    figures = re.findall(r"\d\.\d{4}", exercises()[number - 1].text)
    _, rows = frame(notebook(), "compare-runs")
    (second,) = [row for row in rows if RUNS["2"][0] in row]
    assert figures and set(figures) <= set(second), f"your-turn, exercise {number}"


@pytest.mark.slow
def test_with_c_alone_changed_the_figures_are_those_of_the_second_run(done):
    name, _, _ = passed(exercises()[0].code)
    (run,) = done.client.search_runs(["1"], f"attributes.run_name = '{name}'")
    measured = [f"{run.data.metrics[name]:.4f}" for name in ("accuracy", "log_loss")]
    assert measured == re.findall(r"\d\.\d{4}", exercises()[0].text)
    assert "'accuracy': 1.0" in done.shown[0]


@pytest.mark.slow
def test_the_candidate_is_no_better_than_the_champion(done):
    (figure,) = re.findall(r"\d\.\d{4}", exercises()[1].text)
    assert done.shown[1] == f"/3 1.0 {figure}\n@champion 1.0 {figure}\n"


@pytest.mark.slow
def test_autolog_logs_what_the_text_says_and_not_what_it_says_is_missing(done):
    (run,) = done.client.search_runs(["1"], "attributes.run_name = 'autolog'")
    (model,) = run.outputs.model_outputs
    assert f"{len(run.data.params)} parameters;" in done.shown[2]
    assert f"{len(run.data.params)} parameters" in exercises()[2].text
    assert len(run.data.metrics) == 7 and "seven metrics" in exercises()[2].text
    assert all(name.startswith("training_") for name in run.data.metrics)
    assert {i.dataset.name for i in run.inputs.dataset_inputs} == {"dataset"}
    sources = [v.source for v in done.client.search_model_versions(f"name='{NAME}'")]
    assert len(sources) == 3 and f"models:/{model.model_id}" not in sources


@pytest.mark.slow
def test_the_alias_moves_back_and_version_1_answers_again(done):
    assert "virginica" in done.shown[3]
    assert done.client.get_model_version_by_alias(NAME, "champion").version == "1"


@pytest.mark.slow
def test_with_the_wine_data_in_the_cell_for_data_run_all_ends_well(tmp_path):
    wine, figures = notebook(), re.findall(r"\d\.\d{4}", exercises()[4].text)
    cell(wine, "load-data").source = exercises()[4].code
    with mlflow_server(tmp_path) as address:
        executed = execute(tmp_path / "notebook", address, wine)
        (model,) = mlflow.MlflowClient(address).search_registered_models()
    assert model.name == "wine_quick_start"
    assert "after:  {'champion': '1'}" in output(executed, "promote")
    assert len(figures) == 4
    assert [f for f in figures if f not in output(executed, "compare-runs")] == []
    code = [c.id for c in executed.cells if c.cell_type == "code"]
    shown = "".join(output(executed, cell_id) for cell_id in code)
    assert not re.search("iris|flower|species", shown, re.IGNORECASE)
    assert "ConvergenceWarning" in output(executed, "run-lbfgs", stderr=True)
