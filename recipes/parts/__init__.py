"""The parts that recipes are wired from; they take arguments, no config."""
