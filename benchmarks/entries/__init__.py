"""The entries of the benchmark, one module for each: ``cases(options)`` yields what is to be measured."""
