"""Work spread over processes and machines by Ray: the session, and sweeps over actors that hold the model."""
