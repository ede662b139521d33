from tests.benchmarks.recipes_chart import CHART, read_rows


def test_chart_shows_the_accuracies_in_the_table() -> None:
    chart = CHART.read_text()
    rows = read_rows()
    assert len(rows) == 6
    assert [row.recipe for row in rows if f"{row.recipe} {row.accuracy:.2f} %" not in chart] == []
