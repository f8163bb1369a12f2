/**
 * @file Dragging with mouse, pen or finger. What can be dragged carries `data-drag`, where it can be dropped
 * `data-drop`; while something is dragged, the body has the class `dragging`.
 */

const START_PX = 6;

/**
 * Let what carries `data-drag` be dragged.
 *
 * @param {(dragged: string, target: string) => void} onDrop gets the values of both attributes
 */
export function enableDragging(onDrop) {
  document.addEventListener("pointerdown", (event) => {
    const source = /** @type {Element} */ (event.target).closest("[data-drag]");
    if (source instanceof HTMLElement && event.isPrimary && event.button === 0) new Drag(source, event, onDrop);
  });
}

/** One drag, from the press of the pointer to its release. */
class Drag {
  #listening = new AbortController();
  /** @type {HTMLElement | null} */
  #ghost = null;
  /** @type {HTMLElement | null} */
  #over = null;

  /**
   * @param {HTMLElement} source
   * @param {PointerEvent} start
   * @param {(dragged: string, target: string) => void} onDrop
   */
  constructor(source, start, onDrop) {
    this.source = source;
    this.start = start;
    this.onDrop = onDrop;
    const { signal } = this.#listening;
    const mine = (/** @type {(event: PointerEvent) => void} */ act) => (/** @type {PointerEvent} */ event) => {
      if (event.pointerId === start.pointerId) act(event);
    };
    document.addEventListener("pointermove", mine((event) => this.#move(event)), { signal });
    document.addEventListener("pointerup", mine(() => this.#end(true)), { signal });
    document.addEventListener("pointercancel", mine(() => this.#end(false)), { signal });
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.#end(false), { signal });
  }

  /** @param {PointerEvent} event */
  #move({ clientX, clientY }) {
    if (!this.#ghost) {
      if (Math.hypot(clientX - this.start.clientX, clientY - this.start.clientY) < START_PX) return;
      this.#ghost = this.#lift();
    }
    this.#ghost.style.translate = `${clientX}px ${clientY}px`;
    const below = document.elementFromPoint(clientX, clientY)?.closest("[data-drop]");
    this.#over?.classList.remove("over");
    this.#over = below instanceof HTMLElement ? below : null;
    this.#over?.classList.add("over");
  }

  /** @returns {HTMLElement} what follows the pointer */
  #lift() {
    const ghost = document.createElement("div");
    ghost.className = "ghost";
    ghost.ariaHidden = "true";
    ghost.textContent = String(Number(this.source.dataset.drag) + 1);
    document.body.append(ghost);
    document.body.classList.add("dragging");
    return ghost;
  }

  /** @param {boolean} dropped */
  #end(dropped) {
    this.#listening.abort();
    if (!this.#ghost) return; // a click, which the element hears itself
    this.#ghost.remove();
    document.body.classList.remove("dragging");
    this.#over?.classList.remove("over");
    // The release of the pointer over the source would count as a click on it.
    const swallow = (/** @type {Event} */ click) => click.stopPropagation();
    document.addEventListener("click", swallow, { capture: true, once: true });
    setTimeout(() => document.removeEventListener("click", swallow, { capture: true }));
    if (dropped && this.#over) this.onDrop(String(this.source.dataset.drag), String(this.#over.dataset.drop));
  }
}
