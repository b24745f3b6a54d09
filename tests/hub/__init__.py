"""A local hub that speaks the Hugging Face Hub's HTTP protocol, for tests, benchmarks and the demo.

What is where:
    handle    Hub: starts the process, publishes, misbehaves, asks what was sent
    cases     the table: what is published, what is asked for, what must come back
    oracle    runs a case with the real huggingface_hub, in a process of its own
    plain     an HTTP client that hides nothing
    __main__  the process: hosts and control port
    api lfs   what the two hosts say         control   what tests tell them
    wire      from an answer to bytes        faults    misbehaviour        log   what happened
    repos     commits, references, access    content   bytes and their names
"""

from .content import Random, many_content, many_path
from .handle import Hub, HubError
from .log import Request, token_mark

__all__ = ["Hub", "HubError", "Random", "Request", "many_content", "many_path", "token_mark"]
