"""An algorithm: its function is there, and nothing of it runs when a configuration is loaded."""


def attend(call, shard, carry):
    raise NotImplementedError
