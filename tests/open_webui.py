"""What Open WebUI sends to an OpenAI-compatible connection: shapes recorded from its source.

Read from github.com/open-webui/open-webui, as of 0.10: backend/open_webui/routers/openai.py (verify, models,
chat), routers/tasks.py (title, tags, follow-ups and the rest), utils/payload.py (a model's parameters) and
utils/middleware.py (tools). What the browser adds for Open WebUI itself (chat_id, session_id, features,
files, background_tasks, metadata ...) its server takes out first; max_completion_tokens becomes max_tokens.
"""

from __future__ import annotations

from typing import Any

MODEL = "tiny"
# With forwarding of user info switched on, which is not the default.
HEADERS = {
    "X-OpenWebUI-User-Name": "Ada%20L",
    "X-OpenWebUI-User-Id": "6f9a",
    "X-OpenWebUI-User-Email": "ada@example.org",
    "X-OpenWebUI-User-Role": "admin",
    "X-OpenWebUI-Chat-Id": "0d3c",
    "Cookie": "token=abc; oauth_session_id=def",
    "User-Agent": "Python/3.11 aiohttp/3.13.2",
}

_HISTORY = [
    {"role": "system", "content": "User context"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": [{"type": "text", "text": "and now?"}]},
]


def _task(content: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], "stream": False, **fields}


CHATS: dict[str, dict[str, Any]] = {
    "first message": {"stream": True, "model": MODEL, "messages": [{"role": "user", "content": "hi"}]},
    "with usage": {
        "stream": True,
        "model": MODEL,
        "messages": _HISTORY,
        "stream_options": {"include_usage": True},
    },
    "streaming off": {"stream": False, "model": MODEL, "messages": _HISTORY},
    "all parameters set": {
        "stream": True,
        "model": MODEL,
        "messages": _HISTORY,
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "max_tokens": 12,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.1,
        "seed": 7,
        "stop": ["###"],
        "logit_bias": {"65": -100},
    },
}
TASKS: dict[str, dict[str, Any]] = {
    "title": _task("### Task:\nGenerate a concise title with an emoji.", max_tokens=50),
    "follow-ups": _task("### Task:\nSuggest 3-5 relevant follow-up questions."),
    "tags": _task("### Task:\nGenerate 1-3 broad tags."),
    "queries": _task("### Task:\nAnalyze the chat history for search queries."),
    "autocompletion": _task("### Task:\nYou are an autocompletion system."),
    "emoji": _task("Your task is to reflect the speaker's likely facial expression.", max_tokens=4),
}
# Since 0.10 a model's "Builtin Tools" are on and function calling is native unless they are switched off.
WITH_TOOLS: dict[str, Any] = {
    **CHATS["first message"],
    "tools": [
        {
            "type": "function",
            "function": {"name": "get_current_timestamp", "parameters": {"type": "object", "properties": {}}},
        }
    ],
}
WITH_IMAGE: dict[str, Any] = {
    **CHATS["first message"],
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "what is this?"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
            ],
        }
    ],
}
