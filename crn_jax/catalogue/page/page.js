// A picture that is pasted or dropped anywhere is uploaded as the reference.
(() => {
  const take = (files) => {
    const picture = [...(files || [])].find((file) => file.type.startsWith("image/"));
    const input = document.querySelector("#upload input[type=file]");
    if (!picture || !input) return false;
    const transfer = new DataTransfer();
    transfer.items.add(picture);
    input.files = transfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
    return true;
  };
  document.addEventListener("paste", (event) => {
    if (take(event.clipboardData?.files)) event.preventDefault();
  });
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (event.defaultPrevented) return;
    event.preventDefault();
    take(event.dataTransfer?.files);
  });
  // After a reference was chosen, people say what shall be different about it.
  window.backToText = () => {
    window.scrollTo({ top: 0, behavior: "smooth" });
    document.querySelector("#text textarea")?.focus({ preventScroll: true });
  };
  // On a phone they lie below what was asked.
  window.onToResults = () => {
    if (window.innerWidth > 760) return;
    document.activeElement?.blur();
    document.querySelector("#found")?.scrollIntoView({ behavior: "smooth" });
  };
})();
