"""Runs a ladder, and shows its results as tables and figures."""

# %% Run it. What is done already is found again by its key, so the second time takes no time.
from bitladder.pipeline import Report, Store, load_config, open_ladder, run_ladder

store = Store("artifacts")
run_ladder(open_ladder(load_config("ladder.yaml"), store, lambda event: print(event)))

# %% The table. In a notebook, `report` alone shows it.
report = Report(store, "example")
print(report)

# %% The same as pandas: everything that is known, a row per stage; accuracies are fractions.
frame = report.frame
print(frame[["stage", "test_top1", "drop", "packed_bytes", "compression"]])

# %% Validation accuracy after each epoch, a column per stage.
print(report.epochs.pivot(index="epoch", columns="stage", values="val_top1"))

# %% Where the two-bit rung loses most: its layers with the most quantization noise.
layers = report.layers[report.layers["stage"] == "w2a2"]
print(layers.sort_values("weight_sqnr_db")[["layer", "weight_bits", "weight_sqnr_db"]].head(3))

# %% Figures are matplotlib's; a notebook shows them.
print(sorted(report.figures))
report.figures["accuracy-bytes"].savefig("accuracy-bytes.svg")

# %% The table as a file; as "ladder.html" it is a page with all figures, opened by a double click.
print(report.save("ladder.md"))
