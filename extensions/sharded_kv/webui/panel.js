// Runs once on page load: asks for the panel's state once a second while the panel can be seen, by a click on its hidden
// button. gr.Timer would do it too, but the webui's Gradio has none, and a timer does not stop with its tab hidden.
() => {
  if (window.shardedKvTimer) return [];
  const periodMs = 1000;
  let lastAsked = 0;
  let lastBeat = null;

  const find = (id) => document.getElementById(id);
  const isSeen = (panel) => panel !== null && panel.offsetParent !== null && document.visibilityState === "visible";
  const beat = () => find("sharded_kv-beat")?.dataset.time ?? null;

  // A stopped server would make Gradio show an error for every click: ask quietly first where no answer came.
  const ask = async (button) => {
    if (lastBeat !== null && beat() === lastBeat) {
      const answers = await fetch(window.location.href, { method: "HEAD", cache: "no-store" }).then(() => true, () => false);
      if (!answers) return;
    }
    lastBeat = beat();
    button.click();
  };

  window.shardedKvTimer = setInterval(() => {
    if (!isSeen(find("sharded_kv"))) {
      lastAsked = 0; // when it is seen again, it is asked at once
      return;
    }
    const now = performance.now();
    const button = find("sharded_kv-tick");
    if (button === null || (lastAsked && now - lastAsked < periodMs)) return;
    lastAsked = now;
    ask(button.matches("button") ? button : button.querySelector("button"));
  }, 100);
  return [];
}
