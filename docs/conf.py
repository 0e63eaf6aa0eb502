"""How Sphinx makes a site of these pages: `make site`."""

project = "Bitladder"
html_title = "Bitladder"
extensions = ["myst_parser"]
myst_heading_anchors = 3  # links to headings work as they do on GitHub
html_theme = "furo"  # asks the network for nothing
html_copy_source = html_show_sourcelink = html_show_copyright = False
exclude_patterns: list[str] = []
