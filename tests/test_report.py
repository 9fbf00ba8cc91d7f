"""Tables and pictures say what the records say."""

import re

import pytest

from benchmarks import (
  figures,
  report,
  shapes,
  tables,
  timing,
  train_attention,
)

pytest.importorskip("matplotlib")

MS = {
  "dense": 9.0,
  "scattermoe_jax": 10.0,
  "sonicmoe": 12.0,
  "scattermoe": 25.0,
}


MADE = {"device": "a card", "jax": "1.2"}


def layer_records(names):
  return [
    {
      **MADE,
      "shape": shape,
      "direction": direction,
      "routing": "random",
      "implementation": implementation,
      "ms_median": ms,
      "of_dense": MS["dense"] / ms,
      "times_ours": ms / MS["scattermoe_jax"],
      "tflops": 6000 / ms,
      "peak_mib": None if implementation == "dense" else 100 * ms,
      "held_mib": 50.0,
      "of_peak": ms / 10.0,
      "of_time": 10.0 / ms,
    }
    for shape in names
    for direction in ("forward", "forward+backward")
    for implementation, ms in MS.items()
  ]


def test_layers_table_says_how_much_faster_than_whom():
  header, _, row = tables.layers(layer_records(["C1"])).splitlines()
  assert header.endswith(
    "times faster than sonicmoe | times faster than scattermoe "
    "| peak | peak of sonicmoe | peak of scattermoe |"
  )
  assert row.endswith(
    "| 10.00 ms | 0.90 | 1.20 | 2.50 | 1000 MiB | 1200 MiB | 2500 MiB |"
  )


def test_layers_table_compares_within_a_run():
  records = layer_records(["C1"])
  for r in records:
    if r["implementation"] == "scattermoe_jax":
      r["ms_median"] = 11.0  # Measured again, on a warmer day.
  row = tables.layers(records).splitlines()[-1]
  assert "| 11.00 ms | 0.90 | 1.20 | 2.50 |" in row


def test_layers_table_is_of_one_direction():
  records = layer_records(["C1"])
  for r in records:
    r["ms_median"] *= 1 if r["direction"] == "forward" else 3
  header, _, row = tables.layers(records, "forward").splitlines()
  assert header.startswith("| forward | time ")
  assert "| 10.00 ms |" in row


def test_layers_table_without_a_step_is_nothing():
  forward = [r for r in layer_records(["C1"]) if r["direction"] == "forward"]
  assert tables.layers(forward) == ""


def test_learning_line_names_every_attention():
  runs = [("dense", 2.0694), ("mixture", 2.1036)]
  records = [{"label": n, "validation_bits": bits} for n, bits in runs]
  line = tables.learning(records)
  assert line.endswith("parameters: dense 2.069; mixture 2.104.")


def test_memory_table_says_what_is_saved_and_what_it_costs():
  [record] = [
    r for r in layer_records(["C1"])[4:] if r["implementation"] == "sonicmoe"
  ]
  table = tables.memory([record | {"implementation": "keep_h"}])
  last = table.splitlines()[-1]
  assert last.startswith("| C1: T=24576")
  assert last.endswith(
    "| keep h | 50 MiB | 1200 MiB | 12.00 ms | 1.20 | 0.83 |"
  )


@pytest.mark.parametrize(
  ("name", "label"),
  [
    ("chunks_1", "as it is"),
    ("chunks_16", "16 chunks"),
    ("keep_everything", "keep everything"),
    ("keep_h_chunks_3", "keep h, 3 chunks"),
  ],
)
def test_variants_of_memory_are_called_by_what_they_do(name, label):
  assert figures.variant_label(name) == label


def test_by_k_table_has_a_row_for_each_k_and_a_column_for_each_time():
  records = layer_records(["E64_k8", "E64_k1"])
  records = [
    r
    for r in records
    if (r["shape"], r["implementation"]) != ("E64_k1", "sonicmoe")
    and (r["direction"], r["implementation"]) != ("forward", "scattermoe")
  ]
  table = tables.by_k(records, "more of 64 experts")
  header, _, first, last = table.splitlines()
  assert header == (
    "| more of 64 experts, ms | forward, scattermoe_jax | forward, dense "
    "| forward, sonicmoe | forward+backward, scattermoe_jax "
    "| forward+backward, dense | forward+backward, sonicmoe "
    "| forward+backward, scattermoe |"
  )
  assert first.endswith("k=1 | 10.00 | 9.00 |  | 10.00 | 9.00 |  | 25.00 |")
  assert last.endswith(
    "k=8 | 10.00 | 9.00 | 12.00 | 10.00 | 9.00 | 12.00 | 25.00 |"
  )


def test_by_k_table_is_in_the_order_of_k():
  table = tables.by_k(layer_records(["A", "B_8_1", "B_64_8"]), "by k")
  names = [row.split(":")[0] for row in table.splitlines()[2:]]
  assert names == ["| B_8_1", "| A", "| B_64_8"]


def test_granularity_is_of_the_same_layers_until_it_ran(tmp_path, monkeypatch):
  monkeypatch.setattr(report, "RESULTS", tmp_path)
  assert report.load("card", "bench_granularity") == []
  layers = layer_records(["C1", *shapes.GRANULARITY])
  timing.write_records(tmp_path / "card" / "bench_mlp.json", layers)
  assert report.load("card", "bench_granularity") == layers[8:]
  assert report.load("card", "bench_sparsity") == []
  own = layer_records(["B_64_8"])
  timing.write_records(tmp_path / "card" / "bench_granularity.json", own)
  assert report.load("card", "bench_granularity") == own


def test_train_table_is_beside_the_dense_model():
  dense = {
    "model": "d=8 layers=2",
    "variant": "dense",
    "params": 5e8,
    "ms_median": 100.0,
    "tokens_per_s": 200.0,
    "mfu": 0.5,
    "peak_mib": 2048.0,
    "command": "one",
  }
  mixture = dense | {"variant": "mosaic", "tokens_per_s": 150.0}
  other = mixture | {"model": "d=8 layers=4"}
  apart = mixture | {"command": "another"}
  table = tables.training([mixture, dense, other, apart])
  first, second, third, fourth = table.splitlines()[2:]
  row = "| {}, d=8 layers=2 | 0.50 B | 100 ms | {} | {} | 0.50 | 2.0 GiB |"
  assert first == row.format("a mixture by mosaic", 150, "0.75")
  assert second == row.format("a dense MLP", 200, "1.00")
  assert fourth == row.format("a mixture by mosaic", 150, "")
  assert third == fourth.replace("=2", "=4")


def made_here(records):
  """Returns the records with what says how they were made."""
  made = {"device": "card", "jax": "1", "date": "today"}
  command = "python -m benchmarks.{} --shapes {}"
  return [
    {**r, **made, "command": command.format("some", r["shape"])}
    for r in records
  ]


def test_a_section_is_of_the_chosen_records_and_their_commands(monkeypatch):
  records = made_here(layer_records(["C1", "C2"]))
  monkeypatch.setattr(report, "load", lambda device, bench: records)
  section = report.Section("bench_mlp", tables.layers)
  assert "C1: T=" in section.text() and "C2: T=" in section.text()
  text = section.text(["C2"])
  assert "C2: T=" in text and "--shapes C2`" in text
  assert "C1" not in text
  assert "sonicmoe" in text
  ours = ("scattermoe_jax", "dense")
  assert (
    "sonicmoe" not in section._replace(only={"implementation": ours}).text()
  )


def test_records_of_several_days_say_so(monkeypatch):
  records = made_here(layer_records(["C1", "C2"]))
  records[-1]["date"] = "tomorrow"
  monkeypatch.setattr(report, "load", lambda device, bench: records)
  section = report.Section("bench_mlp", tables.layers)
  assert "card, JAX 1, today to tomorrow: " in section.text()
  assert "card, JAX 1, today: " in section.text(["C1"])


def test_a_section_says_how_far_its_times_spread(monkeypatch):
  records = made_here(layer_records(["C1", "C2"]))
  monkeypatch.setattr(report, "load", lambda device, bench: records)
  section = report.Section("bench_mlp", tables.layers)
  assert "Spread" not in section.text()
  for r in records:
    r |= {"ms_p20": 0.99 * r["ms_median"], "ms_p80": 1.01 * r["ms_median"]}
  records[0]["ms_p80"] = 1.06 * records[0]["ms_median"]
  # Not in the table, and so not in what is said of it.
  records.append({**records[-1], "routing": "zipf", "ms_p20": 0.0})
  spread = "Spread of a time: at most {} of its median."
  assert section.text().endswith(spread.format("7%"))
  assert section.text(["C2"]).endswith(spread.format("2%"))


def test_spreads_of_times_inside_a_record_count():
  time = {"ms_median": 10.0, "ms_p20": 9.0, "ms_p80": 12.0}
  assert tables.widest_spread([{"ours_ms": time, "shape": "S"}]) == 0.3


def test_records_that_were_copied_say_so(monkeypatch):
  records = made_here(layer_records(["C1", "C2"]))
  monkeypatch.setattr(report, "load", lambda device, bench: records)
  section = report.Section("bench_mlp", tables.layers)
  records[0]["note"] = "tiles by its own tuner"
  assert "Copied" not in section.text()
  records[1]["note"] = tables.COPIED
  copied = "Copied from what the command printed: 1 of {} records."
  assert section.text().endswith(copied.format(16))
  assert "Copied" not in section.text(["C2"])


def test_every_copied_record_is_in_a_table_that_says_so():
  counted = 0
  for path in timing.RESULTS.rglob("*.json"):
    notes = [r.get("note") for r in timing.read_records(path)]
    counted += sum(bool(note) and "printed" in note for note in notes)
  said = re.findall(r"printed: (\d+) of", report.speed_section())
  assert counted == sum(map(int, said))


def test_attention_table_leaves_out_rivals_that_did_not_run():
  record = {"implementation": "moa", "top_k": 8, "direction": "forward"}
  record |= {"ms_median": 7.0, "speed_over_regroup": 1.5}
  *_, row = tables.attention([record]).splitlines()
  assert row == "| k=8, forward | 7.00 ms |  | 1.50 |  |"


def test_commands_that_differ_in_their_shapes_are_said_once(monkeypatch):
  records = made_here(layer_records(["C1", "C2"]))
  records[0]["command"] = "python -m benchmarks.other"
  monkeypatch.setattr(report, "load", lambda device, bench: records)
  text = report.Section("bench_mlp", tables.layers).text()
  assert text.endswith(
    "`python -m benchmarks.other` and "
    "`python -m benchmarks.some --shapes C1 C2`."
  )


def test_the_readme_shows_what_a_section_says(monkeypatch):
  records = made_here(layer_records(["C1"]))
  monkeypatch.setattr(
    report, "load", lambda device, bench: records * (bench == "bench_mlp")
  )
  shown = report.Section("bench_mlp", tables.layers)
  all_of_it = shown.text()
  for in_readme, text in (
    (False, "No record yet."),
    (("C1",), all_of_it),
    (("C2",), "No record yet."),
    (True, all_of_it),
  ):
    section = shown._replace(in_readme=in_readme)
    monkeypatch.setattr(report, "SECTIONS", [section])
    assert report.speed_section(readme=True) == text
    assert report.speed_section() == all_of_it


def test_triton_table_says_how_much_faster_than_scattermoe():
  ms = {"triton": 8.0, "scattermoe": 10.0}
  records = [
    {
      "shape": "C1",
      "op": "up",
      "routing": "random",
      "implementation": implementation,
      "ms_median": time,
      "of_dense": 6.0 / time,
      "command": "one",
    }
    for implementation, time in ms.items()
  ]
  *_, row = tables.triton(records).splitlines()
  assert row.startswith("| up, C1: T=") and row.endswith("| 0.75 | 1.25 |")
  records[1]["command"] = "another"
  *_, row = tables.triton(records).splitlines()
  assert row.endswith("| 0.75 |  |")


def test_a_picture_is_of_the_card_where_more_peers_ran(monkeypatch):
  cards = {"h200": layer_records(["C1"]), "h100": layer_records(["C1", "C2"])}
  monkeypatch.setattr(report, "load", lambda device, bench: cards[device])
  assert report.pictured("bench_mlp") == cards["h100"]
  cards["h100"] = layer_records(["C2"])
  assert report.pictured("bench_mlp") == cards["h200"]


def test_no_picture_of_a_layer_alone(monkeypatch):
  records = layer_records(["C1"])
  monkeypatch.setattr(report, "load", lambda device, bench: records)
  assert report.pictured("bench_mlp") == records
  records = [r for r in records if "moe" not in r["implementation"][-3:]]
  assert report.pictured("bench_mlp") == []
  # The others compare variants, or k, or have the bound beside them.
  assert report.pictured("bench_memory") == records


def test_pictures_have_every_implementation(tmp_path, monkeypatch):
  records = {
    # A peer may be in some of the panels alone.
    "bench_mlp": [
      r
      for r in layer_records(["C1", "C2"])
      if (r["direction"], r["implementation"]) != ("forward", "sonicmoe")
    ],
    "bench_memory": [
      r | {"implementation": "chunks_2"} for r in layer_records(["C1"])[5:6]
    ],
    "bench_granularity": layer_records(shapes.GRANULARITY),
    "bench_sparsity": layer_records(shapes.SPARSITY),
  }
  labels, titles = {}, {}
  save = figures._save

  def look(figure, path, records):
    texts = (text for g in figure.legends for text in g.get_texts())
    labels[path.stem] = {text.get_text() for text in texts}
    save(figure, path, records)
    titles[path.stem] = figure.get_suptitle()

  monkeypatch.setattr(figures, "_save", look)
  drawn = figures.draw_all(lambda bench: records[bench], tmp_path)
  assert [path.stem for path in drawn] == list(records)
  assert all(path.stat().st_size > 5000 for path in drawn)
  for bench in ("bench_mlp", "bench_granularity", "bench_sparsity"):
    assert labels[bench] == {figures.LABELS[name] for name in MS}, bench
  assert titles == dict.fromkeys(records, "a card, JAX 1.2")


def test_a_benchmark_that_never_ran_has_no_picture(tmp_path):
  assert figures.draw_all(lambda bench: [], tmp_path / "images") == []
  assert not (tmp_path / "images").exists()


def test_the_picture_of_learning_says_where_it_was_made(tmp_path, monkeypatch):
  import matplotlib.pyplot as plt

  monkeypatch.setattr(train_attention, "PICTURE", tmp_path / "drawn.png")
  run = {"label": "dense", "validation_bits": 2.0, **MADE}
  run |= {"validation_steps": [1, 2], "validation_curve": [2.5, 2.0]}
  train_attention.draw([run])
  [axes] = plt.gcf().axes
  assert axes.get_title(loc="left").endswith("a card, JAX 1.2")
  plt.close()
  assert train_attention.PICTURE.stat().st_size > 5000


@pytest.mark.parametrize("folders", [[], ["runs/mha", "runs/mhb"]])
def test_no_record_of_learning_is_lost_to_a_slip(
  folders, tmp_path, monkeypatch
):
  for name in ("RECORD", "PICTURE"):
    monkeypatch.setattr(train_attention, name, tmp_path / name)
  with pytest.raises(SystemExit):
    train_attention.main(folders)
  assert not list(tmp_path.iterdir())
