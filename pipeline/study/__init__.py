"""Studies: arms x seeds of a ladder, compared by paired statistics."""

from .results import results
from .trials import Study, Trial, load_study, shipped_studies
from .write import study_tables, text, write_study

__all__ = [
    "Study",
    "Trial",
    "load_study",
    "results",
    "shipped_studies",
    "study_tables",
    "text",
    "write_study",
]
