"""A bare FastAPI route under the uvicorn settings of the service: what `benchmarks/load.py` compares with."""

from __future__ import annotations

import uvicorn
from fastapi import FastAPI

from service.serve import server_options
from service.settings import Settings

app = FastAPI()


@app.get("/healthz")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@app.get("/v1/jobs/{job_id}")
async def job(job_id: str) -> dict[str, str]:
    """What a route does that does nothing."""
    return {"id": job_id}


if __name__ == "__main__":
    uvicorn.run(app, **server_options(Settings()))
