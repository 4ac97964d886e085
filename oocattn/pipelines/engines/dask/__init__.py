"""The Dask engine: cluster, workers, graph and tasks."""
