"""The notebook executed again, and its exercises."""

import re

import mlflow
import pytest
from helpers import NAME, cell, execute, kernel, mlflow_server, notebook, output
from sklearn.datasets import load_iris


def predictions(address, number):
    mlflow.set_tracking_uri(address)
    model = mlflow.pyfunc.load_model(f"models:/{NAME}/{number}")
    return list(model.predict(load_iris(as_frame=True).data))


def test_a_second_execution_adds_versions_and_leaves_the_first_alone(client, tmp_path):
    address = client.tracking_uri
    before = [predictions(address, number) for number in (1, 2)]
    folder = tmp_path / "Mappe mit Wörtern 花"  # spaces and non-ASCII letters
    executed = execute(folder, address)
    for cell_id in ["compare-runs", "reload-models", "validate", "use-champion"]:
        assert output(executed, cell_id) == output(
            notebook(), cell_id
        )  # of its own two runs
    rows = [line.split() for line in output(executed, "list-versions").splitlines()[1:]]
    assert [(row[1], "champion" in row) for row in rows] == [("3", False), ("4", True)]
    assert client.get_model_version_by_alias(NAME, "champion").version == "4"
    assert [predictions(address, number) for number in (1, 2)] == before
    assert [path.name for path in folder.iterdir()] == [
        "requirements.txt"
    ]  # nothing is left


@pytest.fixture
def exercises():
    """The code and the figures of each exercise under Your turn."""
    parts = re.split(
        r"^\d\. ", cell(notebook(), "your-turn").source, flags=re.MULTILINE
    )[1:]
    code = [re.search(r"```python\n(.*?)```", part, re.DOTALL)[1] for part in parts]
    code = [re.sub(r"^   ", "", block, flags=re.MULTILINE) for block in code]
    return list(
        zip(code, (re.findall(r"\d\.\d{4}", part) for part in parts), strict=True)
    )


@pytest.mark.slow
def test_a_third_run_and_an_alias_that_moves_back_give_what_the_text_says(
    exercises, tmp_path
):
    (third_run, figures), (move_back, _), _ = exercises
    with (
        mlflow_server(tmp_path) as address,
        kernel(tmp_path / "notebook", address) as run,
    ):
        run()
        run.add(third_run)
        client = mlflow.MlflowClient(address)
        metrics = client.get_run(
            client.get_model_version(NAME, "3").run_id
        ).data.metrics
        assert [f"{metrics[name]:.4f}" for name in ("accuracy", "log_loss")] == figures
        assert "virginica" in run.add(move_back)
        assert client.get_model_version_by_alias(NAME, "champion").version == "1"


@pytest.mark.slow
def test_with_the_wine_data_in_the_cell_for_data_run_all_ends_well(exercises, tmp_path):
    code, figures = exercises[2]
    wine = notebook()
    cell(wine, "load-data").source = code
    cell(wine, "connect").source = cell(wine, "connect").source.replace(
        NAME, "wine_quick_start"
    )
    with mlflow_server(tmp_path) as address:
        executed = execute(tmp_path / "notebook", address, wine)
        (model,) = mlflow.MlflowClient(address).search_registered_models()
    assert model.name == "wine_quick_start"
    assert output(executed, "promote") == "Version 1 is the champion\n"
    assert [f for f in figures if f not in output(executed, "compare-runs")] == []
    printed = "".join(
        output(executed, c.id) for c in executed.cells if c.cell_type == "code"
    )
    assert not re.search("iris|flower|species", printed, re.IGNORECASE)
