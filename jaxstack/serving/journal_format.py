"""An answer that can go on elsewhere: what a server tells a router beside it, and how it goes on with another's.

A request with the header `WANT_JOURNAL` is answered by a stream of events in any case, with comments between them that
are for the router alone:

    : journal {"id", "created", "prompts": [[token ids], ...], "choices"}    first; how many choices there are
    : tokens [[choice, [token ids], ended, logprobs], ...]                   commits the events before it
    : status 500              of an answer that is no stream and has failed: the event behind it says how
    : complete                last; without it the answer has broken off

Events count once the comment behind them has come: a router that passes on no others knows of every character that a
client has had which tokens it came from. Those tokens, the prompt's, and the body are all that another server needs
(`RESUME_PATH`): a draw depends on the seed and its place in the answer alone, and text that is held back (part of a
character, or of a stop string), penalties and grammars follow from the tokens. The seed is the header's value, so that
an answer to a request without one can be gone on with, too.
"""

WANT_JOURNAL = "x-journal"
RESUME_PATH = "/internal/resume"
HEAD, TOKENS, STATUS, COMPLETE = b": journal ", b": tokens ", b": status ", b": complete"
