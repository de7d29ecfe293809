"""Pages and figures: what a run, an evaluation or a model's states look like. Charts are described once, in `charts`,
and drawn by plotly for a page and by matplotlib for a paper. Imports no JAX."""
