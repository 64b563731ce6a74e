// Talking to the server: calls of its API, signing in and out, and the stream of what goes on.

/** Calls the API. `body` is a text of JSON, or a file. Returns what was answered; throws an `Error` with its sentence. */
async function call(method, path, body) {
  const headers = { Accept: "application/json" };
  if (body !== undefined) headers["Content-Type"] = body instanceof File ? "application/octet-stream" : "application/json";
  if (method !== "GET" && session.proof) headers["X-CSRF-Token"] = session.proof;
  let answer, found = {};
  try {
    answer = await fetch(path, { method, headers, body, cache: "no-store" });
  } catch {
    throw new Error("The server does not answer. It may be starting again: try once more.");
  }
  try {
    found = JSON.parse(await answer.text());
  } catch {
    // A proxy's own page, or nothing at all.
  }
  if (answer.ok) return found;
  if (answer.status === 401) signedOut();
  const sentence = found.errors?.[0]?.detail ?? found.detail ?? `The server answers ${answer.status}: try again.`;
  throw Object.assign(new Error(sentence), { status: answer.status });
}

async function begin() {
  try {
    session = await call("GET", "/page/session");
    notice("session", "");
  } catch (error) {
    notice("session", error.message);
    setTimeout(begin, 3000);
    return;
  }
  showSession();
}

function showSession() {
  const isIn = Boolean(session.name);
  $("sign-in").hidden = isIn;
  $("all").hidden = $("keys").hidden = !isIn;
  $("sign-out").hidden = !isIn || session.is_open;
  $("name").textContent = isIn && !session.is_open ? session.name : "";
  $("draw").hidden = $("run-form").hidden = !may("submit");
  $("summary").textContent = "";
  if (isIn) {
    follow();
    showRuns();
    if (may("submit")) makeForm();
  } else {
    $("key").focus();
  }
}

/** The session has ended: forget what was shown. */
function signedOut() {
  if (!session.name || session.is_open) return;
  session = { name: "", scopes: [], proof: "", is_open: false };
  pause();
  jobs.clear();
  fleet = null;
  if (viewer.open) viewer.close();
  showAll();
  showSession();
}

$("sign-in-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("sign-in-error").textContent = "";
  try {
    session = await call("POST", "/page/session", JSON.stringify({ key: $("key").value }));
    $("key").value = "";
    showSession();
  } catch (error) {
    say($("sign-in-error"), error.message);
    $("key").select();
  }
});
// The browser's own bubbles would hide what the server says.
$("sign-in-form").noValidate = true;
$("sign-out").addEventListener("click", async () => {
  try {
    await call("DELETE", "/page/session");
    signedOut();
  } catch (error) {
    notice("session", error.message);
  }
});

/** The stream of what goes on; null while nobody is signed in. */
let stream = null;
let retry = 0;

function follow() {
  pause();
  const mine = stream = new EventSource("/v1/activity");
  let isFirst = true;
  mine.addEventListener("open", () => { notice("stream", ""); isFirst = true; });
  mine.addEventListener("jobs", (event) => {
    const news = JSON.parse(event.data);
    // After a lost connection the first event has everything.
    if (isFirst) jobs.clear();
    isFirst = false;
    news.jobs.forEach(takeRow);
    news.gone.forEach((id) => jobs.delete(id));
    showJobs();
  });
  mine.addEventListener("fleet", (event) => { fleet = JSON.parse(event.data); showFleet(); });
  mine.addEventListener("trouble", (event) => { notice("trouble", JSON.parse(event.data).text); });
  mine.addEventListener("error", () => {
    if (mine !== stream) return;
    notice("stream", "The connection to the server is lost. It is tried again; what is shown may be old.");
    if (mine.readyState !== EventSource.CLOSED) return;  // The browser tries again by itself.
    retry = setTimeout(async () => {
      try {
        const now = await call("GET", "/page/session");
        if (now.name) follow(); else signedOut();
      } catch {
        if (mine === stream) mine.dispatchEvent(new Event("error"));
      }
    }, 2000);
  });
}

// A browser keeps six connections to a server for all of its tabs: a page that nobody sees gives its own back.
function pause() {
  stream?.close();
  stream = null;
  clearTimeout(retry);
}
addEventListener("pagehide", pause);
addEventListener("pageshow", (event) => { if (event.persisted && session.name) follow(); });
document.addEventListener("visibilitychange", () => {
  if (document.hidden) pause();
  else if (session.name && !stream) follow();
});
