"use strict";
(() => {
  const data = JSON.parse(document.getElementById("pairs").textContent);
  const $ = (id) => document.getElementById(id);
  const others = data.models.slice(1);
  const state = { model: others[0], order: "worst", at: 0, blind: false, flipped: {} };
  let votes = {};
  const stored = `votes of ${data.id}`;
  try { votes = JSON.parse(localStorage.getItem(stored)) || {}; } catch { /* no storage: votes last as long as the page */ }

  const gain = (row) => (data.score ? row.scores[state.model] - row.scores[data.models[0]] : 0);
  const rows = () => {
    const found = data.rows.filter((row) => state.model in row.images);
    if (state.order === "worst") found.sort((a, b) => gain(a) - gain(b));
    if (state.order === "best") found.sort((a, b) => gain(b) - gain(a));
    return found;
  };
  // Which side the base is on in a blind test: decided by the pair, so that it stays when one comes back to it.
  const baseIsLeft = (row) => !state.blind || (row.number * 2654435761 + state.model.length) % 4294967296 < 2147483648;

  function show() {
    const list = rows();
    state.at = Math.min(Math.max(state.at, 0), list.length - 1);
    const row = list[state.at];
    const [base, model] = [data.models[0], state.model];
    let sides = baseIsLeft(row) ? [base, model] : [model, base];
    ["left", "right"].forEach((side, i) => {
      const name = state.flipped[side] ? sides[1 - i] : sides[i];
      const image = $(side);
      image.src = row.images[name];
      image.classList.toggle("small", data.small);
      const shown = state.blind ? "AB"[state.flipped[side] ? 1 - i : i] : name;
      const score = state.blind || !data.score ? "" : `, ${data.score} ${row.scores[name].toPrecision(4)}`;
      image.alt = `${shown}: ${row.prompt}`;
      $(`${side}-text`).textContent = shown + score;
    });
    const difference = state.blind || !data.score ? "" : ` (gain ${gain(row) >= 0 ? "+" : ""}${gain(row).toPrecision(3)})`;
    $("prompt").textContent = `${state.at + 1} of ${list.length}: ${row.prompt}${difference}`;
    $("voting").hidden = !state.blind;
    $("blind").setAttribute("aria-pressed", String(state.blind));
    if (state.blind) summarize();
    const hash = `#${new URLSearchParams({ model, order: state.order, at: state.at + 1, ...(state.blind ? { blind: 1 } : {}) })}`;
    history.replaceState(null, "", hash);
  }

  function summarize() {
    const mine = Object.values(votes[state.model] || {});
    const wins = mine.filter((v) => v === 1).length + 0.5 * mine.filter((v) => v === 0.5).length;
    const n = mine.length, z = 1.96;
    if (!n) { $("result").textContent = "No votes yet. Which image is the model's is shown nowhere until you leave the test."; return; }
    const p = wins / n, middle = (p + z * z / (2 * n)) / (1 + z * z / n);
    const half = z * Math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n);
    const percent = (x) => `${(100 * x).toFixed(1)} %`;
    $("result").textContent = `${n} votes: ${state.model} is preferred to the ${data.models[0]} in ${percent(p)} ` +
      `(95 %: ${percent(Math.max(0, middle - half))} to ${percent(Math.min(1, middle + half))}; ties count half).`;
  }

  // side: 0 for A, 1 for B, null for no difference. A vote is 1 where the model's image was preferred.
  function vote(side) {
    const row = rows()[state.at];
    const value = side === null ? 0.5 : Number((side === 1) === baseIsLeft(row));
    (votes[state.model] ||= {})[row.number] = value;
    try { localStorage.setItem(stored, JSON.stringify(votes)); } catch { /* as above */ }
    move(1);
  }

  function move(by) {
    state.at += by;
    state.flipped = {};
    show();
  }

  // As pairs that "smpo import votes.jsonl pairs --root IMAGES" reads: image 0 is the model's.
  function pairs() {
    const lines = rows().filter((row) => row.number in (votes[state.model] || {})).map((row) => JSON.stringify({
      prompt: row.prompt, image_0: row.files[state.model], image_1: row.files[data.models[0]],
      label_0: votes[state.model][row.number],
    }));
    return lines.join("\n") + "\n";
  }

  function save() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([pairs()], { type: "application/jsonl" }));
    link.download = "votes.jsonl";
    link.click();
  }

  function readHash() {
    const given = new URLSearchParams(location.hash.slice(1));
    if (others.includes(given.get("model"))) state.model = given.get("model");
    if (["worst", "best", "prompt"].includes(given.get("order"))) state.order = given.get("order");
    if (Number(given.get("at")) > 0) state.at = Number(given.get("at")) - 1;
    state.blind = given.has("blind");
    $("model").value = state.model;
    $("order").value = state.order;
  }

  for (const name of others) $("model").add(new Option(name, name));
  $("model").onchange = () => { state.model = $("model").value; state.at = 0; show(); };
  $("order").onchange = () => { state.order = $("order").value; state.at = 0; show(); };
  $("previous").onclick = () => move(-1);
  $("next").onclick = () => move(1);
  $("blind").onclick = () => { state.blind = !state.blind; state.flipped = {}; show(); };
  $("vote-left").onclick = () => vote(0);
  $("vote-right").onclick = () => vote(1);
  $("vote-tie").onclick = () => vote(null);
  $("export").onclick = save;
  $("forget").onclick = () => { votes = {}; try { localStorage.removeItem(stored); } catch { /* as above */ } show(); };
  for (const side of ["left", "right"]) $(side).onclick = () => { state.flipped[side] = !state.flipped[side]; show(); };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || ["SELECT", "INPUT", "TEXTAREA"].includes(event.target.tagName)) return;
    const keys = { ArrowLeft: () => move(-1), ArrowRight: () => move(1) };
    if (state.blind) Object.assign(keys, { a: () => vote(0), s: () => vote(null), d: () => vote(1) });
    const action = keys[event.key];
    if (action) { event.preventDefault(); action(); }
  });
  window.addEventListener("hashchange", () => { if (location.hash.includes("=")) { readHash(); show(); } });
  readHash();
  $("viewer").hidden = false;
  const wanted = location.hash;
  show();
  if (wanted && !wanted.includes("=")) history.replaceState(null, "", wanted);
  window.smpoReport = { pairs };
})();
