"""Reports as one page that opens by double click and asks the network for nothing."""

from .ladder import ladder_page
from .study import study_page

__all__ = ["ladder_page", "study_page"]
