"""The sub-commands of `boltlm`, in groups; the command line itself is `boltlm.cli`."""
