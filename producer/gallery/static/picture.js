// A tile's picture, or what stands in its place.

/** A tile's picture, `height` CSS pixels high (not given: as the style says); for a job without one, its state and why. */
function drawPicture(row, height) {
  const picture = make("span", "picture");
  if (height) picture.style.height = `${height}px`;
  const source = thumbnail(row) ?? row.url;
  if (source) {
    const image = make("img");
    image.alt = describe(row);
    image.loading = "lazy";
    image.decoding = "async";
    image.src = source;
    picture.append(image);
  } else {
    const reason = row.error ?? (row.state === "done" ? "Its picture was not found." : "");
    picture.append(makeNote(row.state, reason, row.state !== "failed"));
  }
  return picture;
}

/** What stands where a picture is missing; `quiet` for what is no failure of the job. */
function makeNote(title, text, quiet) {
  const note = make("span", quiet ? "note quiet" : "note");
  note.append(make("b", "", title), make("bdi", "", text));
  return note;
}
