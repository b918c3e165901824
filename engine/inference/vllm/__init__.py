"""Sample on vLLM servers: client, server, and the transfer of new weights from trainer to server."""
