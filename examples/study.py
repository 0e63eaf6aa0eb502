"""Asks whether a teacher helps at two bits, with several seeds."""

from bitladder.flows import study
from bitladder.pipeline import Store
from bitladder.pipeline.study import load_study, study_tables

if __name__ == "__main__":  # the workers are processes of their own, which import this file
    # %% Run every arm with every seed; what is done already is found again.
    rows = study("study.yaml", workers=1)
    last = rows[rows["stage"] == "w2a2"]
    print(last.pivot(index="seed", columns="arm", values="test_top1"))

    # %% Which differences are real: paired by seed, with intervals and corrected p-values.
    tables = study_tables(load_study("study.yaml"), Store("artifacts"))
    print(tables.comparisons.T)
