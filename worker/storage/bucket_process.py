"""The bucket, with its requests made in a process of their own.

The three requests for a picture take more than half of the Python time that a worker spends on it. Only one
thread of a process runs Python at a time, so with jobs of few steps the thread that feeds the GPU would wait
for those that upload. Here a request costs the worker one message to the other process and one back
(docs/performance.md).
"""

from __future__ import annotations


