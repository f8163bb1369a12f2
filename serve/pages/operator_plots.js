/** @file Plots that the server draws: fetched with the key, shown as images, which cannot do anything. */

import { Refused, Unreachable } from "./api.js";
import { element } from "./element.js";
import { inWords } from "./problem.js";

/** One plot; the last drawing stays until the next has come. */
export class Plot {
  #root;
  #path;
  #api;
  #url = "";
  #shown = "";

  /**
   * @param {HTMLElement} root
   * @param {string} path
   * @param {import("./api.js").Api} api
   */
  constructor(root, path, api) {
    this.#root = root;
    this.#path = path;
    this.#api = api;
  }

  /**
   * Fetch the plot, unless it is the one that is shown already.
   *
   * @param {string} told what is plotted, in words: where these are the same, so is the plot
   * @param {string} legend
   */
  async show(told, legend) {
    if (this.#shown === told) return;
    const image = await this.#fetched();
    if (image === null) return;
    this.#clear();
    this.#shown = told;
    this.#url = URL.createObjectURL(image);
    this.#root.replaceChildren(
      element("img", { src: this.#url, alt: legend, width: "400", height: "240" }),
      element("figcaption", {}, told, " ", element("span", { class: "soft", "aria-hidden": "true" }, legend)),
    );
  }

  /** @param {string} words why there is nothing to plot */
  hide(words) {
    this.#clear();
    this.#root.replaceChildren(element("figcaption", { class: "soft" }, words));
  }

  #clear() {
    if (this.#url) URL.revokeObjectURL(this.#url);
    this.#url = this.#shown = "";
  }

  /** @returns {Promise<Blob | null>} null where it could not be had now, which is told */
  async #fetched() {
    try {
      return await this.#api.blob(this.#path);
    } catch (error) {
      if (!(error instanceof Refused || error instanceof Unreachable)) throw error;
      this.hide(inWords(error));
      return null;
    }
  }
}
