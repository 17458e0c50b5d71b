// Runs once on page load: asks for the panel's state once a second while the panel can be seen, by a click on its hidden
// button. gr.Timer would do it too, but the webui's Gradio has none, and a timer does not stop with its tab hidden.
() => {
  if (window.shardedKvTimer) return [];
  const periodMs = 1000;
  let lastAsked = 0;
  let lastTime = null;
  let differed = false;

  const find = (id) => document.getElementById(id);
  const press = (id) => {
    const element = find(id);
    if (element !== null) (element.matches("button") ? element : element.querySelector("button")).click();
  };
  const isSeen = (panel) => panel !== null && panel.offsetParent !== null && document.visibilityState === "visible";

  // A stopped server would make Gradio show an error for every click: ask quietly first where no answer came.
  const ask = async (time) => {
    if (time !== undefined && time === lastTime) {
      const answers = await fetch(window.location.href, { method: "HEAD", cache: "no-store" }).then(() => true, () => false);
      if (!answers) return;
    }
    lastTime = time;
    press("sharded_kv-tick");
  };

  // Another browser may have switched. Twice in a row, since a click here may be on its way.
  const followSwitches = (beat) => {
    const box = document.querySelector("#sharded_kv-activate input[type=checkbox]");
    const mode = document.querySelector("#sharded_kv-mode input[type=radio]:checked");
    const keep = document.querySelector("#sharded_kv-keep input[type=checkbox]");
    const differs =
      (box !== null && String(box.checked) !== beat.activate) ||
      (mode !== null && mode.value !== beat.mode) ||
      (keep !== null && String(keep.checked) !== beat.keep);
    if (differs && differed) press("sharded_kv-sync");
    differed = differs && !differed;
  };

  window.shardedKvTimer = setInterval(() => {
    if (!isSeen(find("sharded_kv"))) {
      lastAsked = 0; // when it is seen again, it is asked at once
      return;
    }
    const now = performance.now();
    if (lastAsked && now - lastAsked < periodMs) return;
    lastAsked = now;
    const beat = find("sharded_kv-beat")?.dataset ?? {};
    if (beat.time !== undefined) followSwitches(beat);
    ask(beat.time);
  }, 100);
  return [];
}
