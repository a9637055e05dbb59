"""The experiments: data sets, named architectures and training."""
