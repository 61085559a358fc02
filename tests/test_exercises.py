"""Your turn: each exercise gives what the text says, and another data set runs through."""

import re

import mlflow
import pytest
from helpers import NAME, cell, execute, kernel, mlflow_server, need_network, notebook, output

pytestmark = pytest.mark.slow


@pytest.fixture
def exercises():
    """The code and the figures of each exercise."""
    text = cell(notebook(), "your-turn").source
    parts = re.split(r"^\d\. ", text, flags=re.MULTILINE)[1:]
    code = [re.search(r"```python\n(.*?)```", part, re.DOTALL)[1] for part in parts]
    code = [re.sub(r"^   ", "", block, flags=re.MULTILINE) for block in code]
    return list(zip(code, (re.findall(r"\d\.\d{4}", part) for part in parts), strict=True))


def test_a_third_run_and_an_alias_that_moves_back_give_what_the_text_says(exercises, tmp_path):
    need_network()
    (third_run, figures), (move_back, _), _ = exercises
    with mlflow_server(tmp_path) as address, kernel(tmp_path / "notebook", address) as run:
        run()
        run.add(third_run)
        client = mlflow.MlflowClient(address)
        metrics = client.get_run(client.get_model_version(NAME, "3").run_id).data.metrics
        assert [f"{metrics[name]:.4f}" for name in ("accuracy", "log_loss")] == figures
        assert "virginica" in run.add(move_back)
        assert client.get_model_version_by_alias(NAME, "champion").version == "1"
        assert (
            run.add("champion.predict(X_test.loc[[77]])") == "array(['versicolor'], dtype=object)"
        )


def test_with_the_wine_data_in_the_cell_for_data_run_all_ends_well(exercises, tmp_path):
    need_network()
    code, figures = exercises[2]
    wine = notebook()
    cell(wine, "load-data").source = code
    connect = cell(wine, "connect")
    assert connect.source.count(NAME) == 1
    connect.source = connect.source.replace(NAME, "wine_quick_start")
    with mlflow_server(tmp_path) as address:
        executed = execute(tmp_path / "notebook", address, wine)
        assert output(executed, "promote") == "Version 1 is the champion\n"
        assert [
            figure for figure in figures if figure not in output(executed, "compare-runs")
        ] == []
        (model,) = mlflow.MlflowClient(address).search_registered_models()
        assert model.name == "wine_quick_start"
    printed = "".join(output(executed, c.id) for c in executed.cells if c.cell_type == "code")
    assert not re.search("iris|flower|species", printed, re.IGNORECASE)
