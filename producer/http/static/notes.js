// What the form says while it is filled in: of syntax that no picture would show, and of schedules.

/** The patterns of `worker.contract.prompt_syntax`, with their sentences, and the schedules of each scheduler. */
const { words, schedules } = JSON.parse($("about").textContent);
/** Characters of what is quoted from a prompt, at most. */
const QUOTED = 40;
const patterns = words.patterns.map(({ name, pattern, flags, alone }) => ({ name, alone, pattern: new RegExp(pattern, flags) }));

const promptNote = make("p", "prompt-note");
const promptNoteText = make("span");
promptNoteText.setAttribute("role", "status");
const readWeights = make("button", "", "Read it as a1111");
readWeights.type = "button";
readWeights.hidden = true;
promptNote.append(promptNoteText, " ", readWeights);

/** The syntax in which the form's prompts will be read. */
function syntaxOfForm() {
  const model = controls.get("model")?.element.value;
  const worker = fleet?.workers.find((each) => !model || each.model === model);
  return controls.get("prompt_syntax")?.element.value || worker?.prompt_syntax || "plain";
}

/** The first text that a pattern finds, as the record quotes it. */
function quotedFrom(texts, pattern) {
  const characters = [...texts.map((text) => pattern.exec(text)).find((match) => match)[0]];
  return characters.length <= QUOTED ? characters.join("") : characters.slice(0, QUOTED - 3).join("") + "...";
}

/** Says what of the prompts would be drawn as words, in the sentence that the record will have. */
function notePrompt() {
  const texts = ["prompt", "negative_prompt"].map((name) => controls.get(name)?.element.value ?? "");
  const found = syntaxOfForm() === "plain" ? patterns.filter(({ pattern }) => texts.some((text) => pattern.test(text))) : [];
  const sentence = !found.length ? "" : (found.length === 1 ? found[0].alone : words.several)
    .replace("{names}", () => found.map(({ pattern }) => quotedFrom(texts, pattern)).join(", "));
  if (promptNoteText.textContent !== sentence) promptNoteText.textContent = sentence;
  readWeights.hidden = !sentence.includes("prompt_syntax");
}

readWeights.addEventListener("click", () => {
  controls.get("prompt_syntax").element.value = "a1111";
  notePrompt();
  promptNoteText.textContent = "The prompt is read as a1111: the field prompt syntax is under All fields.";
  controls.get("prompt").element.focus();
});

/** All options of the field for schedules; null before the form is made. */
let allSchedules = null;

/** Offers the schedules that the chosen scheduler has. */
function fitSchedules() {
  const scheduler = controls.get("scheduler"), schedule = controls.get("schedule")?.element;
  if (!scheduler || !schedule) return;
  allSchedules ??= [...schedule.options];
  const chosen = scheduler.element.value || scheduler.schema.default;
  const offered = schedules[chosen] ?? [], before = schedule.value;
  schedule.replaceChildren(...allSchedules.filter(({ value }) => !value || offered.includes(value)));
  schedule.value = offered.includes(before) ? before : "";
  let note = $("schedule-note");
  if (!note) {
    note = make("small");
    note.id = "schedule-note";
    schedule.after(note);
  }
  const has = offered.length ? `${offered.length + 1} schedules` : "its own schedule alone";
  note.textContent = `The scheduler ${chosen} has ${has}. The table of all is in docs/job-fields.md.`;
}
