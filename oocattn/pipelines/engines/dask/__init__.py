"""The Dask engine: the cluster, the workers that take part, the graph and its tasks."""
